"""The example ``grpo.py`` on a real GPU: models that learn, and models that do not fit it together.

Needs ray, PyTorch and transformers; the second test also a GPU of 80 GB and as much host RAM as three models take.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from daemons import ROOT, PrivateDaemon
from ray_cluster import NO_MULTICAST

pytest_plugins = ["gpu_fixtures"]
pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.timeout(600)]
STEPS = 25
ROLES = 3
LARGE = ("--hidden", "4096", "--layers", "18", "--lr", "5e-5")
NEEDED_VRAM_MB, NEEDED_RAM_GIB = 78_000, 140


@pytest.fixture(autouse=True)
def libraries() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


def steps(daemon: PrivateDaemon, *options: str) -> Iterator[str]:
    """What the program says of each step, as it comes: a first start of Ray can be long."""
    with subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "examples/in_ray/grpo.py"), *options],
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
        said = []
        try:
            assert program.stdout
            for line in program.stdout:
                print(line, end="", flush=True)
                said.append(line)
                if line.startswith("step "):
                    yield line
            program.wait(60)
        finally:
            program.kill()
    assert program.returncode == 0, "".join(said)


def test_grpo_learns_while_its_models_take_turns(daemon: PrivateDaemon) -> None:
    said = "".join(steps(daemon, "--steps", str(STEPS)))
    rewards = [float(each) for each in re.findall(r"mean reward (\d\.\d+)", said)]
    assert len(rewards) == STEPS
    assert rewards[0] < 0.05 < 0.5 < rewards[-1]
    swapped = daemon.client().status()["metrics"]["freezes"]
    # Each is frozen when it is made; then policy, or reward and reference, go off by turns.
    assert swapped >= ROLES + ROLES * STEPS - 1


def test_three_models_that_exceed_the_gpu_together_take_turns(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        vram_mb = client.status()["gpus"][0]["mem_total_mb"]
        if vram_mb < NEEDED_VRAM_MB or psutil.virtual_memory().available < NEEDED_RAM_GIB << 30:
            pytest.skip(f"needs {NEEDED_VRAM_MB} MiB of VRAM and {NEEDED_RAM_GIB} GiB of RAM")
        taken_mb = [
            sum(process["mem_mb"] for process in client.processes())
            for _ in steps(daemon, "--steps", "4", *LARGE)
        ]
    assert len(taken_mb) == 4
    assert min(taken_mb) > vram_mb
