"""The driver helper's process: what it may import."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from gpusched.mechanisms.driver_client import DriverClient

if TYPE_CHECKING:
    import pytest


async def test_the_helper_imports_nothing_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root daemon started in a user's directory must not run what the user put there."""
    for name in ("msgspec", "gpusched"):
        planted = tmp_path / name
        planted.mkdir()
        (planted / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    options = ["--backend", "sim", "--sim-dir", str(tmp_path / "sim")]
    async with asyncio.TaskGroup() as tasks:
        driver = DriverClient(
            [*options, "--sim-gpus", "1", "--sim-vram-bytes", str(1 << 20)], tasks
        )
        assert (await driver.describe()).simulated
        driver.close()
        await driver.wait_closed()
    assert not (tmp_path / "ran").exists()
