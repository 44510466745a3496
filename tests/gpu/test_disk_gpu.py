"""The disk tier on real GPUs: what comes back from disk has the VRAM that it went with.

Run with ``pytest -m gpu tests/gpu/test_disk_gpu.py`` as root on a machine with an NVIDIA GPU and a CRIU that works
(``make criu``); two GPUs for the copies on another one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched import GpuSched
from gpusched.demo import digests, wait_for_lines
from gpusched.errors import GpuschedError

pytest_plugins = ["gpu_fixtures"]
pytestmark = [pytest.mark.gpu, pytest.mark.criu]

VRAM = "600M"
#: What a device has in use when a process has left it may still move a little: the driver's own.
_SLACK_MB = 64


def start(client: GpuSched, name: str, vram: str = VRAM, seed: int = 1) -> str:
    """Starts a workload; returns the digest of its contents."""
    command = [sys.executable, "-m", "gpusched.workload", "--vram", vram, "--seed", str(seed)]
    client.run(name, command)
    return wait_for_lines(client, name, 1)[0][1]


def verify(client: GpuSched, name: str, digest: str) -> None:
    """New ticks, all with the digest of the beginning."""
    lines = wait_for_lines(client, name, len(digests(client, name)) + 2)
    assert {d for _, d in lines} == {digest}


def states(client: GpuSched) -> dict[str, str]:
    return {p["name"]: p["state"] for p in client.processes()}


def used_mb(client: GpuSched, gpu: int = 0) -> int:
    return int(client.status()["gpus"][gpu]["mem_used_mb"])


def images(daemon: PrivateDaemon) -> list[Path]:
    return list((daemon.state_dir / "images").iterdir())


def test_a_cuda_process_goes_to_disk_and_comes_back(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        idle = used_mb(client)
        digest = start(client, "w")
        for before in ("active", "frozen"):
            if before == "frozen":
                client.freeze("w")
            went = client.hibernate("w")
            assert went["tier"] == "disk" and went["disk_mb"] >= 600
            assert states(client) == {"w": "hibernated"}
            assert used_mb(client) < idle + _SLACK_MB, "its VRAM is free"
            print("hibernate", went["duration_ms"], went["phases_ms"], went["disk_mb"], "MiB")
            came = client.thaw("w")
            print("wake", came["duration_ms"], came["phases_ms"])
            assert came["from_tier"] == "disk"
            verify(client, "w", digest)
        wait_until(lambda: not images(daemon), within_s=10, what="the images are deleted")
        # Frozen and thawed as any other, also afterwards.
        client.freeze("w")
        assert client.thaw("w")["from_tier"] == "ram"
        verify(client, "w", digest)


def test_it_survives_the_daemon_on_disk_and_a_crash_of_it_on_the_way(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        digest = start(client, "w", "64M")
        client.hibernate("w")
    daemon.restart()
    with daemon.client() as client:
        client.thaw("w")
        verify(client, "w", digest)
    for method in ("hibernate", "thaw"):
        killed = threading.Thread(target=_kill_soon, args=(daemon, 0.4))
        killed.start()
        with daemon.client() as client, contextlib.suppress(GpuschedError, OSError):
            client.call(method, name="w")
        killed.join()
        daemon.start()
        with daemon.client() as client:
            assert states(client)["w"] in ("active", "frozen", "hibernated")
            client.thaw("w")
            verify(client, "w", digest)


def _kill_soon(daemon: PrivateDaemon, delay_s: float) -> None:
    time.sleep(delay_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(daemon.pid, signal.SIGKILL)
    daemon.kill9()


def test_three_copies_live_on_one_gpu_at_the_same_time(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        digest = start(client, "w")
        result = client.fork("w", 3)
        print("fork", result)
        names = ["w", *result["copies"]]
        assert states(client) == dict.fromkeys(names, "active")
        assert used_mb(client) > 4 * 600
        for name in names:
            verify(client, name, digest)
        copy = result["copies"][1]
        client.freeze(copy)
        client.thaw(copy)
        verify(client, copy, digest)


@pytest.mark.gpu(count=2)
def test_copies_live_on_another_gpu(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        digest = start(client, "w")
        copies = client.fork("w", 2, [1])["copies"]
        found = {p["name"]: p["gpu"] for p in client.processes()}
        assert found == {"w": 0, **dict.fromkeys(copies, 1)}
        assert used_mb(client, 1) > 2 * 600
        for name in ("w", *copies):
            verify(client, name, digest)


def test_the_coldest_goes_to_disk_when_the_ram_budget_is_full() -> None:
    """Three models, bigger together than the budget, take turns; each contents is right every time."""
    # Two of 2 GiB with their CUDA contexts (0.3 to 1.2 GiB each) fit, three do not.
    daemon = PrivateDaemon(backend="cuda", args=["--ram-budget", "6500M"])
    try:
        daemon.start()
        with daemon.client() as client:
            found = {f"m{n}": start(client, f"m{n}", "2G", seed=n) for n in (1, 2, 3)}
            client.freeze("m1")
            client.freeze("m2")
            went = client.freeze("m3")
            assert went.get("to_disk") == ["m1"], (went, client.status()["memory"])
            assert states(client) == {"m1": "hibernated", "m2": "frozen", "m3": "frozen"}
            for name, digest in found.items():
                client.thaw(name)
                verify(client, name, digest)
                client.freeze(name)
    finally:
        daemon.end()
