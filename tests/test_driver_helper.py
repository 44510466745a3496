"""The driver helper's process: what it may import, which GPUs it sees, how long it may take to open the driver."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from gpusched.mechanisms import driver_client
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
    async with asyncio.TaskGroup() as tasks:
        driver = DriverClient(simulated(tmp_path), tasks)
        assert (await driver.describe()).simulated
        driver.close()
        await driver.wait_closed()
    assert not (tmp_path / "ran").exists()


def simulated(tmp_path: Path) -> list[str]:
    options = ["--backend", "sim", "--sim-dir", str(tmp_path / "sim"), "--sim-gpus", "1"]
    return [*options, "--sim-vram-bytes", str(1 << 20)]


async def test_opening_the_driver_does_not_count_as_the_first_calls_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a helper that opens slowly would be replaced for ever after the first one died."""
    monkeypatch.setattr(driver_client, "LOOK_DEADLINE_S", 0.01)  # shorter than any start
    async with asyncio.TaskGroup() as tasks:
        driver = DriverClient(simulated(tmp_path), tasks)
        assert (await driver.usage()).gpus
        driver.close()
        await driver.wait_closed()


async def test_the_helper_sees_every_gpu_whatever_the_daemon_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    async with asyncio.TaskGroup() as tasks:
        driver = DriverClient(simulated(tmp_path), tasks)
        await driver.describe()
        environ = Path(f"/proc/{driver.helper_pid}/environ").read_bytes()
        driver.close()
        await driver.wait_closed()
    assert b"CUDA_VISIBLE_DEVICES" not in environ
    assert b"PATH=" in environ
