"""The demonstration ends everything that it started, also when somebody ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from daemons import wait_until


def mentioning(*texts: str) -> list[int]:
    """The processes whose command lines hold all of ``texts``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(text in line for text in texts):
            found.append(int(entry.name))
    return found


def test_a_ctrl_c_ends_everything_that_was_started() -> None:
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as base:
        demo = subprocess.Popen(
            [sys.executable, "-m", "gpusched.demo"],
            env={**os.environ, "TMPDIR": base},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        wait_until(
            lambda: mentioning(base, "supervisor.py policy"),
            within_s=30,
            what="the first model is there",
        )
        (daemon,) = mentioning(base, " daemon ")
        assert os.getpgid(daemon) != demo.pid, "the daemon would end before what it manages"
        os.killpg(demo.pid, signal.SIGINT)
        _, complaint = demo.communicate(timeout=30)
        assert demo.returncode != 0
        assert b"KeyboardInterrupt" in complaint
        wait_until(lambda: not mentioning(base), within_s=10, what="every process is gone")
        assert not list(Path(base).glob("gpusched-demo-*"))
