"""The example ``grpo.py`` on a real GPU, with its small random models. Needs ray, PyTorch and transformers."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from ray_on_gpu import NO_MULTICAST

from daemons import ROOT, PrivateDaemon

pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.timeout(600)]
STEPS = 25
ROLES = 3


def test_grpo_learns_while_its_models_take_turns() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    daemon = PrivateDaemon(backend="cuda")
    try:
        daemon.start()
        lines = []
        with subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "examples/in_ray/grpo.py"), "--steps", str(STEPS)],
            env={
                **os.environ,
                "GPUSCHED_SOCKET": daemon.socket,
                "GPUSCHED_RAY_DIR": str(daemon.directory / "ray"),
                "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
                **NO_MULTICAST,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as program:
            assert program.stdout
            try:
                for line in program.stdout:  # shown as they come: a first start of Ray can be long
                    print(line, end="", flush=True)
                    lines.append(line)
                program.wait(60)
            finally:
                program.kill()
        assert program.returncode == 0, "".join(lines)
        rewards = [float(each) for each in re.findall(r"mean reward (\d\.\d+)", "".join(lines))]
        assert len(rewards) == STEPS
        assert rewards[0] < 0.05 < 0.5 < rewards[-1]
        swapped = daemon.client().status()["metrics"]["freezes"]
        # Each is frozen when it is made; then policy, or reward and reference, go off by turns.
        assert swapped >= ROLES + ROLES * STEPS - 1
    finally:
        daemon.end()
