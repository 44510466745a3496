"""CuPy and JAX past the driver's copy, on a real GPU: each checks its own every step against NumPy.

Run with ``pytest -m gpu tests/gpu/test_frameworks_gpu.py`` as root. GPUSCHED_ROUNDS sets the number of rounds.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import time
from pathlib import Path

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched import GpuSched, preload

pytest_plugins = ["gpu_fixtures"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not preload.library(), reason="the library was not built"),
]

ROUNDS = int(os.environ.get("GPUSCHED_ROUNDS", "10"))
BUSY = Path(__file__).with_name("array_busy.py")


def steps(client: GpuSched, name: str) -> int:
    """How far it is. Raises AssertionError where it found anything wrong."""
    lines = client.logs(name, 20)["lines"]
    wrong = [line for line in lines if "WRONG" in line or "Error" in line]
    assert not wrong, lines
    if any("no GPU for" in line for line in lines):
        pytest.skip(lines[-1])
    found = [line.split()[1:] for line in lines[:-1] if line.startswith("steps")]
    return int(found[-1][0]) if found else 0


def goes_on(client: GpuSched, name: str) -> None:
    before = steps(client, name)
    wait_until(lambda: steps(client, name) > before, within_s=30, what=f"{name} goes on")


@pytest.mark.parametrize(
    ("framework", "allocator"),
    [("cupy", ""), *(("jax", each) for each in ("", "platform", "cuda_async", "vmm"))],
)
def test_a_busy_process_leaves_and_comes_back(
    daemon: PrivateDaemon, rng: random.Random, framework: str, allocator: str
) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    env = dict(os.environ) | ({"XLA_PYTHON_CLIENT_ALLOCATOR": allocator} if allocator else {})
    with daemon.client() as client:
        client.run("busy", [sys.executable, str(BUSY), framework, "1"], env=env)
        wait_until(
            lambda: (
                client.processes()[0]["state"] == "dead" or "steps" in client.logs("busy")["output"]
            ),
            within_s=110,
            what=f"{framework} works",
        )
        if allocator and client.processes()[0]["state"] == "dead":
            pytest.skip(f"this JAX has no allocator {allocator!r}")
        wait_until(lambda: steps(client, "busy") > 0, within_s=20, what="it says how far it is")
        for number in range(ROUNDS):
            time.sleep(rng.uniform(0, 0.2))
            off = client.freeze("busy", keep_context=number % 2 == 1)
            on = client.thaw("busy")
            print(off["mem_mb"], off["path"], off["duration_ms"], on["path"], on["duration_ms"])
            goes_on(client, "busy")
