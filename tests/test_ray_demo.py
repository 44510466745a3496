"""The demonstration in Ray ends everything that it started, also when somebody ends it. (CI runs all of it.)"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from daemons import processes_naming, wait_until


@pytest.mark.ray
@pytest.mark.slow  # a Ray of its own; CI runs the whole demonstration
def test_a_ctrl_c_ends_the_loop_its_ray_and_its_daemon() -> None:
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as base:
        program = [sys.executable, "-m", "ray_integration.demo", "--plot", f"{base}/demo.png"]
        demo = subprocess.Popen(
            program,
            env={
                **os.environ,
                "TMPDIR": base,
                "PYTHONUNBUFFERED": "1",
                "RAY_ADDRESS": "127.0.0.1:1",  # a cluster that is not the demonstration's
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert demo.stdout is not None
        lines = iter(demo.stdout.readline, "")
        step = next(line for line in lines if line.startswith("step "))
        assert re.match(
            r"step  1  reward 0\.\d+ #* +swaps +\d+ ms of +\d+ ms  contents right", step
        )
        os.kill(demo.pid, signal.SIGINT)
        _, complaint = demo.communicate(timeout=60)
        assert demo.returncode != 0
        assert "KeyboardInterrupt" in complaint
        wait_until(lambda: not processes_naming(base), within_s=15, what="every process is gone")
        assert not list(Path(base).glob("gpusched-demo-*"))
