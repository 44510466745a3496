"""The examples of docs/sdk.md run as they stand, against a daemon with a simulated GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import StartDaemon
from gpusched import preload

ROOT = Path(__file__).resolve().parent.parent


def test_the_examples_of_the_page_run_in_their_order(private_daemon: StartDaemon) -> None:
    page = (ROOT / "docs" / "sdk.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 8
    if not preload.library():  # there is no C compiler
        examples = [each for each in examples if "preload_env" not in each]
    daemon = private_daemon(vram="1G")
    python = Path(sys.executable).parent
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(examples)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={
            "GPUSCHED_SOCKET": daemon.socket,
            "PATH": f"{python}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for said in (
        r"^policy is back after \d+ ms",
        r"policy frozen ram",
        r"reward active gpu",
        r"reward came from gpu",
        r"ended 1 lease",
        r"2 processes at the start\n(.*\n)*freeze reward \d+",
        r"not_found - ",
        r"daemon is not running",
        r"thaw policy\n\d+ MiB free",
    ):
        assert re.search(said, ended.stdout), f"{said!r} is missing in:\n{ended.stdout}"
    assert daemon.client().processes() == []
