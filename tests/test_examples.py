"""The examples run as they stand, against a daemon with a simulated GPU, and leave nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import PrivateDaemon, wait_until

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in {".py", ".sh"})

#: What each must print; a `.` in a text matches any character.
SAID = {
    "freeze_and_thaw.py": (
        r"^running: 156 MiB of the GPU are free$",
        r"^frozen in \d+ ms: 256 MiB are free$",
        r"^thawed in \d+ ms: 156 MiB are free$",
        r"^contents are the same$",
    ),
    "two_models_one_gpu.py": (
        r"^step 1: policy   tick \d+ digest=",
        r"^step 3: reward   tick \d+ digest=",
        r"^refused: policy needs 150 MiB on GPU 0; 106 MiB would be free",
    ),
    "adopt_running.py": (
        r"^training: ready digest=",
        r"^frozen: 100 MiB moved to host RAM$",
        r"^thawed in \d+ ms$",
        r"^training: tick \d+ digest=",
        r"^ended$",
    ),
    "socat.sh": (
        r'^\{"ok":true,"result":\{"name":"example","duration_ms":\d+,"mem_mb":100,.*"tier":"ram"',
        r'"from_tier":"ram"',
        r'"id":1\}$',
        r'"id":2\}$',
        r'^\{"ok":true,"result":\{"name":"example"\}\}$',
    ),
}
ARGUMENTS = {"two_models_one_gpu.py": ["150M"]}


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    daemon = PrivateDaemon(vram="256M")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.end()


def test_every_example_is_tested_short_and_listed() -> None:
    assert {path.name for path in EXAMPLES} == set(SAID)
    listed = re.findall(r"^\| \[([^/]+?)\]\(\1\)", (ROOT / "examples/README.md").read_text(), re.M)
    assert sorted(listed) == [path.name for path in EXAMPLES]
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES}
    assert {name: length for name, length in lengths.items() if length >= 80} == {}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_does_what_it_says_and_leaves_nothing(
    example: Path, daemon: PrivateDaemon
) -> None:
    if example.suffix == ".sh" and shutil.which("socat") is None:
        pytest.skip("needs the socat program")
    strict = [sys.executable, "-W", "error"] if example.suffix == ".py" else []
    ended = subprocess.run(
        [*strict, str(example), *ARGUMENTS.get(example.name, [])],
        env={
            "PATH": os.environ["PATH"],
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
            "PYTHON": sys.executable,
            "GPUSCHED_SOCKET": daemon.socket,
            "GPUSCHED_SIM_DIR": str(
                daemon.sim_dir
            ),  # for the program that the daemon does not start
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for said in SAID[example.name]:
        assert re.search(said, ended.stdout, re.M), f"{said!r} is missing in:\n{ended.stdout}"
    assert daemon.client().processes() == []
    wait_until(
        lambda: daemon.client().gpu_free_mb() == 256, within_s=5, what="the GPU is free again"
    )
