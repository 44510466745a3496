"""VRAM past the driver's copy, on a real GPU: a PyTorch program that is never at rest checks its own every step.

Run with ``pytest -m gpu tests/gpu/test_direct_gpu.py`` as root on a machine with an NVIDIA GPU and PyTorch, with the
library built (pip does that where a C compiler is). GPUSCHED_ROUNDS sets the number of rounds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched import GpuSched, preload
from gpusched.errors import GpuschedError
from gpusched.mechanisms.cuda.target import Target

pytest_plugins = ["gpu_fixtures"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not preload.library(), reason="the library was not built"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch"),
]

ROUNDS = int(os.environ.get("GPUSCHED_ROUNDS", "20"))
KILLS = int(os.environ.get("GPUSCHED_KILLS", "6"))
THREADS = 4
BUSY = Path(__file__).with_name("torch_busy.py")


def start(client: GpuSched, name: str, gigabytes: float, *arguments: str, **more: Any) -> int:
    command = [sys.executable, str(BUSY), str(gigabytes), *arguments]
    pid = client.run(name, command, **more)["pid"]
    wait_until(lambda: bool(steps(client, name)), within_s=90, what=f"{name} works")
    return pid


def with_allocator(settings: str) -> dict[str, str]:
    return dict(os.environ) | ({"PYTORCH_CUDA_ALLOC_CONF": settings} if settings else {})


def movable(pid: int) -> list[int]:
    """The pieces of memory of a process that can go past the driver, in bytes."""
    target = Target.find(pid)
    assert target is not None
    with target:
        return [piece.size_bytes for piece in target.pieces()]


def steps(client: GpuSched, name: str) -> list[int]:
    """What each of its threads has done. Raises AssertionError where it found anything wrong."""
    lines = client.logs(name, 20)["lines"]
    wrong = [line for line in lines if "WRONG" in line or "Error" in line]
    assert not wrong, wrong
    found = [line.split()[1:] for line in lines if line.startswith("steps")]
    whole = [
        line for line in found if len(line) == THREADS
    ]  # the last may not be written to its end
    return [int(count) for count in whole[-1]] if whole else []


def goes_on(client: GpuSched, name: str) -> None:
    before = steps(client, name)
    wait_until(
        lambda: all(a < b for a, b in zip(before, steps(client, name), strict=True)),
        within_s=30,
        what=f"every thread of {name} goes on",
    )


@pytest.mark.parametrize("keep_context", [False, True])
def test_a_busy_process_leaves_and_comes_back_at_random_moments(
    daemon: PrivateDaemon, rng: random.Random, keep_context: bool
) -> None:
    with daemon.client() as client:
        start(client, "busy", 2)
        for _ in range(ROUNDS):
            threading.Event().wait(rng.uniform(0, 0.2))
            off = client.freeze("busy", keep_context=keep_context)
            on = client.thaw("busy")
            assert (off["path"], on["path"]) == ("direct", "direct")
            assert (off.get("context_mb", 0) > 100) == keep_context
            print(off["duration_ms"], off["phases_ms"], on["duration_ms"], on["phases_ms"])
        goes_on(client, "busy")


def test_a_context_that_was_kept_goes_when_it_is_in_the_way(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        start(client, "one", 2)
        used_mb = client.status()["gpus"][0]["mem_used_mb"]
        kept = client.freeze("one", keep_context=True)
        assert 100 < kept["context_mb"] < 2000, kept
        start(client, "two", 1)  # which takes room without asking
        wait_until(lambda: entry(client, "one")["context_mb"] == 0, within_s=20, what="it is gone")
        off, _ = client.swap("two", "one", keep_context=True)
        assert off["context_mb"] > 100, off
        goes_on(client, "one")
        client.freeze("one", keep_context=True)
        for name in ("one", "two"):
            deep = client.freeze(name)
            print(deep)
            assert entry(client, name)["state"] == "frozen"
        wait_until(
            lambda: client.status()["gpus"][0]["mem_used_mb"] < used_mb - 2000,
            within_s=10,
            what="the GPU is free",
        )
        print(client.status()["gpus"][0]["mem_used_mb"], "MiB taken with both frozen, of", used_mb)
        for name in ("one", "two"):
            client.thaw(name)
            goes_on(client, name)


def entry(client: GpuSched, name: str) -> Any:
    return next(p for p in client.processes() if p["name"] == name)


@pytest.mark.parametrize("keep_context", [False, True])
def test_an_allocator_that_makes_and_maps_its_memory_itself_goes_the_same_way(
    daemon: PrivateDaemon, rng: random.Random, keep_context: bool
) -> None:
    with daemon.client() as client:
        pid = start(client, "busy", 2, env=with_allocator("expandable_segments:True"))
        sizes = movable(pid)
        print(len(sizes), "pieces,", sum(sizes), "bytes")
        assert sum(sizes) > 1.8e9
        for _ in range(ROUNDS):
            threading.Event().wait(rng.uniform(0, 0.2))
            off = client.freeze("busy", keep_context=keep_context)
            on = client.thaw("busy")
            assert (off["path"], on["path"]) == ("direct", "direct")
            assert off.get("context_mb", 0) < 2000
            print(off["duration_ms"], off["phases_ms"], on["duration_ms"], on["phases_ms"])
        goes_on(client, "busy")


def test_an_allocator_of_the_drivers_own_goes_whichever_way_and_stays_right(
    daemon: PrivateDaemon, rng: random.Random
) -> None:
    with daemon.client() as client:
        start(client, "busy", 1, env=with_allocator("backend:cudaMallocAsync"))
        for _ in range(max(2, ROUNDS // 4)):
            threading.Event().wait(rng.uniform(0, 0.2))
            off, on = client.freeze("busy"), client.thaw("busy")
            print(off["path"], off["duration_ms"], on["path"], on["duration_ms"])
            goes_on(client, "busy")


def test_graphs_that_are_being_captured_are_not_spoiled(
    daemon: PrivateDaemon, rng: random.Random
) -> None:
    with daemon.client() as client:
        start(client, "busy", 1, "capture")
        for _ in range(ROUNDS):
            threading.Event().wait(rng.uniform(0, 0.2))
            off, on = client.freeze("busy"), client.thaw("busy")
            assert (off["path"], on["path"]) == ("direct", "direct")
        goes_on(client, "busy")


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_a_child_that_does_nothing_does_not_matter(daemon: PrivateDaemon, settings: str) -> None:
    with daemon.client() as client:
        start(client, "busy", 1, "fork", env=with_allocator(settings))
        for keep_context in (False, True):
            off = client.freeze("busy", keep_context=keep_context)
            on = client.thaw("busy")
            assert (off["path"], on["path"]) == ("direct", "direct")
            goes_on(client, "busy")


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_one_that_exits_in_the_middle_of_a_freeze_leaves_nothing(
    daemon: PrivateDaemon, rng: random.Random, settings: str
) -> None:
    with daemon.client() as client:
        for number in range(max(2, ROUNDS // 3)):
            name = f"busy{number}"
            pid = start(client, name, 1, env=with_allocator(settings))
            worker = threading.Thread(target=_freeze_and_thaw, args=(daemon, name))
            worker.start()
            threading.Event().wait(rng.uniform(0, 0.6))
            os.kill(pid, signal.SIGUSR1)
            worker.join()
            wait_until(
                lambda: client.processes()[-1]["state"] == "dead", within_s=30, what="it ended"
            )
            client.kill(name)
        start(client, "after", 1)
        off, on = client.freeze("after"), client.thaw("after")
        assert (off["path"], on["path"]) == ("direct", "direct")
        goes_on(client, "after")


def _freeze_and_thaw(daemon: PrivateDaemon, name: str) -> None:
    """Until it is gone; frozen, it does not exit: the signal waits for it."""
    with contextlib.suppress(GpuschedError), daemon.client() as client:
        client.freeze(name)
        client.thaw(name)


def test_it_goes_to_disk_and_into_copies(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        start(client, "busy", 0.5)
        try:
            client.hibernate("busy")
        except GpuschedError as error:
            if error.code != "unsupported":
                raise
            pytest.skip(f"no disk tier here: {error}")
        client.thaw("busy")
        goes_on(client, "busy")
        client.freeze("busy")
        copies = client.fork("busy", 2)["copies"]
        for name in copies:
            goes_on(client, name)
        client.thaw("busy")
        goes_on(client, "busy")


def test_whoever_is_killed_nothing_is_lost(daemon: PrivateDaemon, rng: random.Random) -> None:
    """The mover, the driver helper, the daemon or the process itself, at random moments of freezes and thaws."""
    with daemon.client() as client:
        start(client, "busy", 2)
        client.freeze("busy")
        client.thaw("busy")
    for number in range(KILLS):
        who = ("mover", "helper", "daemon", "target")[number % 4]
        with daemon.client() as client:
            pid = entry(client, "busy")["pid"]
        worker = threading.Thread(
            target=_move_until_it_fails, args=(daemon, random.Random(rng.random()))
        )
        worker.start()
        threading.Event().wait(rng.uniform(0.1, 2.0))
        if who == "target":
            os.kill(pid, signal.SIGKILL)
        else:
            _kill(daemon, who)
        if who != "daemon":
            threading.Event().wait(1.0)
            daemon.kill9()
        worker.join()
        daemon.start()
        with daemon.client() as client:
            if who == "target":
                _require_nothing_left(client)
                start(client, "busy", 2)
            else:
                client.thaw("busy")
                goes_on(client, "busy")
        print(number, who, flush=True)


def _require_nothing_left(client: GpuSched) -> None:
    """Of a process that was killed in the middle."""
    assert entry(client, "busy")["state"] == "dead"
    client.kill("busy")
    status = client.status()
    assert status["memory"]["snapshots_mb"] == 0
    wait_until(
        lambda: client.status()["gpus"][0]["mem_used_mb"] < 1500, within_s=20, what="VRAM is back"
    )


def _move_until_it_fails(daemon: PrivateDaemon, rng: random.Random) -> None:
    with contextlib.suppress(GpuschedError, OSError), daemon.client() as client:
        while True:
            with contextlib.suppress(GpuschedError):
                client.freeze("busy", keep_context=rng.random() < 0.5)
                if rng.random() < 0.3:
                    client.freeze("busy")
                client.thaw("busy")
            client.status()


def _kill(daemon: PrivateDaemon, who: str) -> None:
    if who == "daemon":
        daemon.kill9()
        return
    module = {"mover": "gpusched.mechanisms.cuda.mover", "helper": "driver_host"}[who]
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if module in (entry / "cmdline").read_text().replace("\0", " "):
                os.kill(pid, signal.SIGKILL)
