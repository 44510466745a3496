"""VRAM past the driver's copy for a program on two GPUs that reach each other's memory, where it asks for that.

Run with ``pytest -m gpu tests/gpu/test_direct_peers_gpu.py`` as root on a machine with two NVIDIA GPUs and PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched import GpuSched, preload
from gpusched.mechanisms.cuda.target import Target

pytest_plugins = ["gpu_fixtures"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not preload.library(), reason="the library was not built"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch"),
]

ROUNDS = int(os.environ.get("GPUSCHED_ROUNDS", "10"))
TWO = Path(__file__).with_name("torch_two.py")


def steps(client: GpuSched) -> int:
    lines = client.logs("two", 20)["lines"]
    assert not any("WRONG" in line or "Error" in line for line in lines), lines
    found = [line.split() for line in lines if line.startswith("steps")]
    whole = [line for line in found if len(line) == 2]
    return int(whole[-1][1]) if whole else 0


def goes_on(client: GpuSched) -> None:
    before = steps(client)
    wait_until(lambda: steps(client) > before + 1, within_s=60, what="it goes on")


@pytest.mark.parametrize("direct", ["1", ""])
@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_two_gpus_of_one_process_leave_and_come_back(
    daemon: PrivateDaemon, settings: str, direct: str
) -> None:
    """Without the wish, it is the driver's copy as before."""
    env = dict(os.environ)
    if settings:
        env["PYTORCH_CUDA_ALLOC_CONF"] = settings
    if direct:
        env["GPUSCHED_DIRECT"] = direct
    with daemon.client() as client:
        if len(client.status()["gpus"]) < 2:
            pytest.skip("needs two GPUs")
        pid = client.run("two", [sys.executable, str(TWO), "1"], gpus=[0, 1], env=env)["pid"]
        wait_until(lambda: steps(client) > 0, within_s=120, what="it works")
        target = Target.find(pid)
        assert (target is not None) == bool(direct)
        if target is not None:
            with target:
                pieces = target.pieces()
            print(len(pieces), "pieces,", sum(piece.size_bytes for piece in pieces), "bytes")
            assert sum(piece.size_bytes for piece in pieces) > 2e9
            assert len({piece.gpu for piece in pieces}) == 2
        for number in range(ROUNDS if direct else 2):
            off = client.freeze("two", keep_context=number % 2 == 1)
            on = client.thaw("two")
            print(off["path"], off["duration_ms"], on["path"], on["duration_ms"])
            assert (off["path"], on["path"]) == (("direct",) if direct else ("driver",)) * 2
            goes_on(client)
