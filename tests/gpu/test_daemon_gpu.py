"""The whole daemon on real GPUs: contents verified after every move, whatever is killed in between.

Run with ``pytest -m gpu tests/gpu`` as root on a machine with an NVIDIA GPU; two GPUs for the migrations.
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched import GpuSched
from gpusched.demo import digests, wait_for_lines
from gpusched.errors import GpuschedError, Unsupported

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

#: Kills of the daemon, and of its driver helper, at random moments of random moves.
KILLS = 10
HELPER_KILLS = 4


def start(client: GpuSched, name: str, vram: str = "600M", **more: Any) -> str:
    """Starts a workload; returns the digest of its contents."""
    extra = more.pop("extra", [])
    command = [sys.executable, "-m", "gpusched.workload", "--vram", vram, *extra]
    client.run(name, command, **more)
    return wait_for_lines(client, name, 1)[0][1]


def verify(client: GpuSched, name: str, digest: str, count: int = 1) -> None:
    """New ticks of every one of ``count`` workloads that write this log, all with the digest of the beginning."""
    lines = wait_for_lines(client, name, len(digests(client, name)) + 2 * count)
    assert {d for _, d in lines} == {digest}


def in_parallel(calls: list[Callable[[], Any]]) -> None:
    failures: list[BaseException] = []

    def guarded(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def used_mb(client: GpuSched) -> list[int]:
    """VRAM in use on each GPU. Of an idle one too: the driver keeps half a GiB and more for itself."""
    return [gpu["mem_used_mb"] for gpu in client.status()["gpus"]]


def test_the_same_process_freezes_and_thaws_fifty_times(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        idle = used_mb(client)
        digest = start(client, "w", vram="64M", extra=["--busy"])
        for _ in range(50):
            frozen = client.freeze("w")
            assert frozen["mem_mb"] >= 64
            assert client.thaw("w")["from_tier"] == "ram"
        verify(client, "w", digest)
        client.freeze("w")
        assert used_mb(client)[0] < idle[0] + 64, "a frozen process leaves the GPU"


def test_a_tree_of_three_cuda_processes_moves_as_one(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        child = f"{sys.executable} -m gpusched.workload --vram 200M"
        client.run("tree", ["bash", "-c", f"{child} & {child} & {child}"])
        digest = wait_for_lines(client, "tree", 6)[0][1]
        for _ in range(5):
            assert client.freeze("tree")["mem_mb"] >= 600
            client.thaw("tree")
            verify(client, "tree", digest, count=3)


def test_four_processes_move_at_once(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        names = ["a", "b", "c", "d"]
        found = {n: start(client, n, extra=["--seed", str(i)]) for i, n in enumerate(names)}
        for _ in range(5):
            in_parallel([lambda n=n: client.freeze(n) for n in names])  # type: ignore[misc]
            in_parallel([lambda n=n: client.thaw(n) for n in names])  # type: ignore[misc]
        for name, digest in found.items():
            verify(client, name, digest)


def test_what_the_daemon_adds_to_the_drivers_calls(daemon: PrivateDaemon) -> None:
    """At most 10 ms each way (median); the benchmark has the figures."""
    with daemon.client() as client:
        start(client, "w")
        over: dict[str, list[float]] = {"freeze": [], "thaw": []}
        for _ in range(9):
            off, on = client.freeze("w"), client.thaw("w")
            over["freeze"].append(off["duration_ms"] - off["driver_ms"])
            over["thaw"].append(on["duration_ms"] - on["driver_ms"])
        medians = {verb: sorted(values)[4] for verb, values in over.items()}
        assert max(medians.values()) <= 10, medians


def test_a_daemon_killed_at_random_moments_loses_nothing(daemon: PrivateDaemon) -> None:
    seed = int(os.environ.get("GPUSCHED_SEED", "0")) or random.SystemRandom().randrange(10**6)
    print(f"GPUSCHED_SEED={seed}")
    rng = random.Random(seed)
    with daemon.client() as client:
        found = {n: start(client, n, extra=["--seed", n[1]]) for n in ("w1", "w2")}
    for _ in range(KILLS):

        def work() -> None:
            with daemon.client() as client:
                try:
                    while True:
                        client.swap("w1", "w2")
                        client.swap("w2", "w1")
                except (GpuschedError, OSError):
                    return  # the daemon is gone

        worker = threading.Thread(target=work)
        worker.start()
        worker.join(rng.uniform(0.05, 2.5))
        daemon.kill9()
        worker.join()
        daemon.start()
        with daemon.client() as client:
            for name, digest in found.items():
                client.thaw(name)
                verify(client, name, digest)


@pytest.mark.parametrize("verb", ["freeze", "thaw"])
def test_a_driver_helper_killed_in_the_middle_loses_nothing(
    daemon: PrivateDaemon, verb: str
) -> None:
    with daemon.client() as client:
        digest = start(client, "w", vram="2G")
        for round_ in range(HELPER_KILLS):
            if verb == "thaw":
                client.freeze("w")
            helper = helper_of(daemon.pid)
            killer = threading.Timer(0.1 + 0.2 * round_, os.kill, (helper, signal.SIGKILL))
            killer.start()
            try:
                client.call(verb, name="w")
            except GpuschedError as error:
                print(f"{verb} {round_}: {error}")
            killer.cancel()
            wait_until(
                lambda: client.processes()[0]["state"] in ("active", "frozen"),
                within_s=60,
                what="a settled state",
            )
            client.thaw("w")
            verify(client, "w", digest)


ORDINARY_CLIENT = """
import sys
from gpusched import GpuSched
from gpusched.demo import digests, wait_for_lines
with GpuSched(sys.argv[1]) as client:
    client.run("w", [sys.executable, "-m", "gpusched.workload", "--vram", "200M"])
    for _ in range(3):
        lines = wait_for_lines(client, "w", len(digests(client, "w")) + 2)
        assert len({digest for _, digest in lines}) == 1, lines
        assert client.freeze("w")["tier"] == "ram"
        assert client.thaw("w")["from_tier"] == "ram"
"""


@pytest.mark.root
def test_a_daemon_of_an_ordinary_user_moves_its_own_processes() -> None:
    nobody = 65534
    look = [sys.executable, "-c", "import gpusched.daemon"]
    try:
        subprocess.run(look, user=nobody, group=nobody, extra_groups=(), check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("another user cannot run this interpreter or read this checkout")
    daemon = PrivateDaemon(backend="cuda", user=nobody)
    try:
        daemon.start()
        client = [sys.executable, "-c", ORDINARY_CLIENT, daemon.socket]
        done = subprocess.run(
            client, user=nobody, group=nobody, extra_groups=(), cwd="/", timeout=60, check=False
        )
        assert done.returncode == 0
    finally:
        daemon.end()


def helper_of(daemon_pid: int) -> int:
    """The pid of the daemon's driver helper."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if parent == daemon_pid and "driver_host" in command:
            return int(entry.name)
    raise AssertionError("the daemon has no driver helper")


def test_managed_memory_is_refused_and_the_process_runs_on(daemon: PrivateDaemon) -> None:
    program = (
        "from cuda.bindings import driver as d\nimport time\n"
        "d.cuInit(0); c = d.cuDevicePrimaryCtxRetain(0)[1]; d.cuCtxSetCurrent(c)\n"
        "p = d.cuMemAllocManaged(4 << 20, 1)[1]; d.cuMemsetD8(p, 7, 4 << 20); d.cuCtxSynchronize()\n"
        "i = 0\nwhile True: print('alive', i, flush=True); i += 1; time.sleep(0.1)\n"
    )
    with daemon.client() as client:
        client.run("m", [sys.executable, "-c", program])
        wait_until(lambda: client.logs("m")["lines"], within_s=30, what="managed memory in use")
        with pytest.raises(GpuschedError, match="managed memory"):
            client.freeze("m")
        before = len(client.logs("m", lines=-1)["lines"])
        wait_until(
            lambda: len(client.logs("m", lines=-1)["lines"]) > before + 2,
            within_s=10,
            what="it runs on",
        )


NCCL_RANK = """
import os, sys, time, torch, torch.distributed as dist
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=rank, world_size=2)
for number in range(10_000):
    ones = torch.ones(1 << 20, device="cuda")
    dist.all_reduce(ones)
    assert bool((ones == 2).all())
    print("alive", number, flush=True)
    time.sleep(0.1)
"""


@pytest.mark.gpu(count=2)
def test_peer_to_peer_of_nccl_is_refused_and_the_ranks_run_on(daemon: PrivateDaemon) -> None:
    pytest.importorskip("torch")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quoted = shlex.join([sys.executable, "-c", NCCL_RANK, str(port)])
    with daemon.client() as client:
        client.run("n", ["bash", "-c", f"RANK=0 {quoted} & RANK=1 {quoted} & wait"], gpus=[0, 1])
        wait_until(lambda: len(client.logs("n")["lines"]) > 4, within_s=60, what="both talk")
        with pytest.raises(Unsupported, match=r"NCCL \(the socket"):
            client.freeze("n")
        before = len(client.logs("n", lines=-1)["lines"])
        wait_until(
            lambda: len(client.logs("n", lines=-1)["lines"]) > before + 4,
            within_s=10,
            what="they run on",
        )


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_process_migrates_both_ways(daemon: PrivateDaemon, frozen: bool) -> None:
    with daemon.client() as client:
        idle = used_mb(client)
        digest = start(client, "w")  # run sets CUDA_VISIBLE_DEVICES to GPU 0 alone
        for target in (1, 0, 1, 0):
            if frozen:
                client.freeze("w")
            moved = client.migrate("w", gpu=target)
            assert (moved["from_gpu"], moved["to_gpu"]) == (1 - target, target)
            verify(client, "w", digest)
            assert client.processes()[0]["gpu"] == target
            grown = [used - before for used, before in zip(used_mb(client), idle, strict=True)]
            assert grown[target] >= 600 > 300 > grown[1 - target]
        client.freeze("w")
        client.thaw("w")
        verify(client, "w", digest)


@pytest.mark.gpu(count=2)
def test_a_process_on_two_gpus_moves_whole(daemon: PrivateDaemon) -> None:
    with daemon.client() as client:
        idle = used_mb(client)
        digest = start(client, "w", gpus=[0, 1], extra=["--gpu", "0,1"])
        for _ in range(3):
            client.freeze("w")
            grown = [used - before for used, before in zip(used_mb(client), idle, strict=True)]
            assert max(grown) < 300
            client.thaw("w")
            verify(client, "w", digest)
