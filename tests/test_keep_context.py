"""Contexts that a freeze leaves on the GPU: there for as long as there is room, and gone when anybody needs it."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, wait_until
from disk_tier import again, ask_quietly
from gpusched.aio import AsyncGpuSched
from gpusched.mechanisms.sim.control import CONTEXT_BYTES, Word
from gpusched.mechanisms.sim.layout import SimDirectory
from gpusched.mechanisms.sim.script import Script, When
from gpusched.units import MIB
from workloads import Workload, done, entries, refused

CONTEXT_MB = CONTEXT_BYTES // MIB


def free_mb(daemon: PrivateDaemon, gpu: int = 0) -> int:
    """VRAM that nobody takes, in MiB, by a sample that is new."""
    time.sleep(0.3)
    free: int = done(daemon, "status")["gpus"][gpu]["mem_free_mb"]
    return free


def test_a_context_that_is_kept_is_all_that_stays(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="100M")
    model = Workload.start(daemon, "model", "24M")
    for _ in range(2):
        result = done(daemon, "freeze", name="model", keep_context=True)
        assert (result["context_mb"], result["tier"], result["mem_mb"]) == (CONTEXT_MB, "ram", 24)
        model.require("frozen", context_mb=CONTEXT_MB)
        assert free_mb(daemon) == 100 - CONTEXT_MB
        done(daemon, "thaw", name="model")
        model.require("active")
        model.require_contents()


def test_a_freeze_that_leaves_nothing_takes_a_kept_context_off(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(vram="100M")
    model = Workload.start(daemon, "model", "24M")
    done(daemon, "freeze", name="model", keep_context=True)
    result = done(daemon, "freeze", name="model", keep_context=True)
    assert (result["duration_ms"], result["context_mb"]) == (0, CONTEXT_MB), "nothing to do"
    assert "context_mb" not in done(daemon, "freeze", name="model")
    model.require("frozen")
    assert free_mb(daemon) == 100
    # What has none cannot get one by a freeze.
    assert done(daemon, "freeze", name="model", keep_context=True)["context_mb"] == 0
    done(daemon, "thaw", name="model")
    model.require_contents()


def test_two_that_swap_keep_theirs_while_there_is_room(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", "24M", seed=1)
    done(daemon, "freeze", name="a", keep_context=True)
    b = Workload.start(daemon, "b", "24M", seed=2)
    for off, on in ((b, a), (a, b), (b, a)):
        result = done(daemon, "swap", off=off.name, on=on.name, keep_context=True)
        assert result["off"][0]["context_mb"] == CONTEXT_MB
        off.require("frozen", context_mb=CONTEXT_MB)
        on.require("active")
        on.require_contents()


def test_a_swap_leaves_nothing_where_both_would_not_fit(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="26M")
    a = Workload.start(daemon, "a", "24M", seed=1)
    done(daemon, "freeze", name="a")
    b = Workload.start(daemon, "b", "24M", seed=2)
    result = done(daemon, "swap", off="b", on="a", keep_context=True)
    assert result["off"][0]["context_mb"] == 0
    b.require("frozen")
    a.require_contents()


def test_others_contexts_go_when_a_thaw_needs_the_room(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="60M")
    large = Workload.start(daemon, "large", "46M", seed=9)
    done(daemon, "freeze", name="large")
    models = [Workload.start(daemon, f"m{n}", "16M", seed=n) for n in (1, 2, 3)]
    extra = Workload.start(daemon, "extra", "4M", seed=10)
    for model in models:
        done(daemon, "freeze", name=model.name, keep_context=True)
    # 44 are free: one context is needed, of the one that was used longest ago.
    done(daemon, "thaw", name="large")
    large.require_contents()
    models[0].require("frozen")
    for model in models[1:]:
        model.require("frozen", context_mb=CONTEXT_MB)
    done(daemon, "freeze", name="large")
    for model in models:
        done(daemon, "thaw", name=model.name)
        model.require_contents()
    extra.require_contents()


def test_contexts_go_when_a_process_is_started_on_their_gpu(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(gpus=2, vram="40M")
    here = Workload.start(daemon, "here", "16M", gpu=0, seed=1)
    there = Workload.start(daemon, "there", "16M", gpu=1, seed=2)
    for model in (here, there):
        done(daemon, "freeze", name=model.name, keep_context=True)
    new = Workload.start(daemon, "new", "38M", gpu=0, seed=3)
    here.require("frozen")
    there.require("frozen", context_mb=CONTEXT_MB)
    new.require_contents()


def test_contexts_go_before_anybody_is_evicted(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    kept = Workload.start(daemon, "kept", "16M", seed=1)
    done(daemon, "freeze", name="kept", keep_context=True)
    waiting = Workload.start(daemon, "waiting", "30M", seed=2)
    done(daemon, "freeze", name="waiting")
    active = Workload.start(daemon, "active", "8M", seed=3)
    result = done(daemon, "thaw", name="waiting", evict=True)
    assert "evicted" not in result
    kept.require("frozen")
    active.require_contents()
    waiting.require_contents()


def test_what_does_not_fit_even_so_is_refused_and_contexts_stay(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(vram="40M")
    large = Workload.start(daemon, "large", "30M", seed=2)
    done(daemon, "freeze", name="large")
    kept = Workload.start(daemon, "kept", "8M", seed=1)
    Workload.start(daemon, "active", "24M", seed=3)
    done(daemon, "freeze", name="kept", keep_context=True)
    answer = refused(daemon, "insufficient_gpu_memory", "thaw", name="large")
    assert "Active there: active." in answer["error"]
    kept.require("frozen", context_mb=CONTEXT_MB)
    done(daemon, "swap", off="active", on="large", keep_context=True)
    large.require_contents()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_context_that_cannot_go_leaves_everything_as_it_was(
    private_daemon: StartDaemon, when: When
) -> None:
    daemon = private_daemon(vram="40M")
    script = Script(daemon.sim_dir)
    kept = Workload.start(daemon, "kept", "24M", seed=1)
    done(daemon, "freeze", name="kept", keep_context=True)
    script.add("checkpoint", pid=kept.pid, when=when, error="UNKNOWN")
    if when == "before":
        answer = refused(daemon, "driver_error", "freeze", name="kept")
        assert "rolled back (now kept is frozen)" in answer["error"]
        kept.require("frozen", context_mb=CONTEXT_MB)
    else:  # the driver says that it is done all the same
        done(daemon, "freeze", name="kept")
        kept.require("frozen")
    done(daemon, "thaw", name="kept")
    kept.require_contents()


class Short:
    """40 MiB: ``waiting`` (30) has no room beside ``active`` (8) and the context that ``kept`` (16) has left."""

    def __init__(self, private_daemon: StartDaemon) -> None:
        self.daemon = private_daemon(vram="40M")
        self.script = Script(self.daemon.sim_dir)
        self.kept = Workload.start(self.daemon, "kept", "16M", seed=1)
        done(self.daemon, "freeze", name="kept")
        self.waiting = Workload.start(self.daemon, "waiting", "30M", seed=2)
        done(self.daemon, "freeze", name="waiting")
        self.active = Workload.start(self.daemon, "active", "8M", seed=3)
        done(self.daemon, "thaw", name="kept")
        done(self.daemon, "freeze", name="kept", keep_context=True)


@pytest.fixture
def short(private_daemon: StartDaemon) -> Short:
    return Short(private_daemon)


def test_a_context_that_will_not_go_is_no_error_of_who_needs_the_room(short: Short) -> None:
    daemon = short.daemon
    short.script.add("checkpoint", pid=short.kept.pid, error="UNKNOWN", times=2)
    answer = refused(daemon, "insufficient_gpu_memory", "thaw", name="waiting")
    assert "Active there: active." in answer["error"]
    short.kept.require("frozen", context_mb=CONTEXT_MB)
    short.waiting.require("frozen")
    # Where it may, it takes the room from somebody else.
    assert done(daemon, "thaw", name="waiting", evict=True)["evicted"] == ["active"]
    short.kept.require("frozen", context_mb=CONTEXT_MB)
    short.waiting.require_contents()


def test_who_ends_while_its_context_goes_has_made_room(short: Short) -> None:
    short.script.add("checkpoint", pid=short.kept.pid, when="before", delay_s=1.0)
    killer = threading.Timer(0.4, os.kill, (short.kept.pid, signal.SIGKILL))
    killer.start()
    done(short.daemon, "thaw", name="waiting")
    killer.join()
    assert entries(short.daemon)["kept"]["state"] == "dead"
    short.waiting.require_contents()


def test_whose_context_goes_is_its_owners_again_as_soon_as_it_has(short: Short) -> None:
    short.script.add("restore", pid=short.waiting.pid, when="before", delay_s=3.0)
    with ThreadPoolExecutor(1) as pool:
        thaw = pool.submit(done, short.daemon, "thaw", name="waiting")
        wait_until(
            lambda: short.kept.entry["context_mb"] == 0, within_s=10, what="the context has gone"
        )
        begun = time.monotonic()
        done(short.daemon, "kill", name="kept")
        assert time.monotonic() - begun < 2.0
        thaw.result(20)
    short.waiting.require_contents()


def test_a_start_beside_a_swap_freezes_nobody(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", "16M", seed=1)
    done(daemon, "freeze", name="a", keep_context=True)
    b = Workload.start(daemon, "b", "16M", seed=2)
    done(daemon, "swap", off="b", on="a", keep_context=True)
    done(daemon, "swap", off="a", on="b", keep_context=True)
    Script(daemon.sim_dir).add("checkpoint", pid=b.pid, when="before", delay_s=1.0)
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(done, daemon, "swap", off="b", on="a", keep_context=True)
        time.sleep(0.3)
        for number in range(3):
            done(daemon, "run", name=f"true{number}", cmd=["true"])
        swap.result(20)
    time.sleep(0.5)
    a.require("active")
    a.require_contents()
    done(daemon, "freeze", name="a")


def test_what_stays_is_promised_to_nobody_else(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", "24M", seed=1)
    c = Workload.start(daemon, "c", "14M", seed=3)
    for name in ("a", "c"):
        done(daemon, "freeze", name=name)
    b = Workload.start(daemon, "b", "24M", seed=2)
    Script(daemon.sim_dir).add("restore", pid=a.pid, when="before", delay_s=1.0)
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(done, daemon, "swap", off="b", on="a", keep_context=True)
        time.sleep(0.4)
        refused(daemon, "insufficient_gpu_memory", "thaw", name="c")
        assert swap.result(20)["off"][0]["context_mb"] == CONTEXT_MB
    a.require_contents()
    b.require("frozen", context_mb=CONTEXT_MB)
    c.require("frozen")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_daemon_killed_while_a_context_goes_finds_it_frozen(
    private_daemon: StartDaemon, when: When
) -> None:
    daemon = private_daemon(vram="40M")
    model = Workload.start(daemon, "model", "24M")
    done(daemon, "freeze", name="model", keep_context=True)
    Script(daemon.sim_dir).add("checkpoint", pid=model.pid, when=when, delay_s=1.0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_quietly, daemon, "freeze", name="model")
        wait_until(lambda: not model.is_stopped, within_s=5, what="it runs for its checkpoint")
        time.sleep(0.2)
        daemon.kill9()
        asked.result(20)
    daemon.start()
    context_mb = model.entry["context_mb"]
    model.require("frozen", context_mb=context_mb)
    done(daemon, "thaw", name="model")
    model.require_contents()


def test_a_plain_swap_that_was_cut_short_is_taken_back_whole(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="26M")
    parts = [Workload.start(daemon, f"b{n}", "12M", seed=n) for n in (1, 2)]
    for part in parts:
        done(daemon, "freeze", name=part.name)
    a = Workload.start(daemon, "a", "24M", seed=3)
    # An error, since a driver helper outlives its daemon until its calls are done: the swap could be complete by then.
    script = Script(daemon.sim_dir)
    script.add("restore", pid=parts[1].pid, when="before", delay_s=2.0, error="UNKNOWN")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_quietly, daemon, "swap", off="a", on=["b1", "b2"])
        wait_until(
            lambda: parts[0].driver()[0] is Word.RUNNING, within_s=10, what="the first is on"
        )
        daemon.kill9()
        asked.result(20)
    daemon.start()
    a.require("active")
    a.require_contents()
    for part in parts:
        part.require("frozen")


def test_recovery_counts_what_a_process_has_of_its_own_room(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    b = Workload.start(daemon, "b", "36M", seed=2)
    done(daemon, "freeze", name="b")
    a = Workload.start(daemon, "a", "38M", seed=1)
    Script(daemon.sim_dir).add("checkpoint", pid=a.pid, when="after", delay_s=2.0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_quietly, daemon, "freeze", name="a", keep_context=True)
        wait_until(lambda: a.driver()[0] is Word.PARKED, within_s=10, what="its contents are off")
        daemon.kill9()
        asked.result(20)
    daemon.start()
    done(daemon, "thaw", name="a")
    a.require_contents()
    b.require("frozen")


def test_only_whose_context_goes_runs_for_that(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    program = (
        f"{sys.executable} -m gpusched.workload --vram 8M & while :; do echo on; sleep 0.01; done"
    )
    done(daemon, "run", name="tree", cmd=["sh", "-c", program])
    log = daemon.log_dir / "tree.log"
    wait_until(lambda: "ready" in log.read_text(), within_s=30, what="it is ready")
    done(daemon, "freeze", name="tree", keep_context=True)
    Script(daemon.sim_dir).add("checkpoint", when="before", delay_s=0.5)
    said = log.read_text().count("on\n")
    assert "context_mb" not in done(daemon, "freeze", name="tree")
    assert log.read_text().count("on\n") == said, "the shell, which has no context, stood still"
    done(daemon, "thaw", name="tree")
    wait_until(lambda: log.read_text().count("on\n") > said, within_s=10, what="it goes on")


def test_a_tree_with_one_context_left_of_two_is_frozen_and_known_again(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(vram="40M")
    program = f"{sys.executable} -m gpusched.workload --vram 8M"
    tree = done(daemon, "run", name="tree", cmd=["sh", "-c", f"{program} & {program} & wait"])
    log = daemon.log_dir / "tree.log"
    wait_until(lambda: log.read_text().count("ready") == 2, within_s=30, what="both are ready")
    first, second = (child.pid for child in psutil.Process(tree["pid"]).children())

    def words() -> list[Word]:
        records = map(SimDirectory(daemon.sim_dir).record, (first, second))
        return [record.word for record in records if record]

    def require_work() -> None:
        count = log.read_text().count("tick")
        wait_until(
            lambda: log.read_text().count("tick") > count + 4, within_s=10, what="they work on"
        )

    for leaves_first in (True, False):
        kept = done(daemon, "freeze", name="tree", keep_context=True)
        assert (kept["context_mb"], kept["mem_mb"]) == (2 * CONTEXT_MB, 16)
        Script(daemon.sim_dir).add("checkpoint", pid=second, error="UNKNOWN")
        refused(daemon, "driver_error", "freeze", name="tree")
        for _ in range(2):
            assert words() == [Word.CHECKPOINTED, Word.PARKED]
            tree = entries(daemon)["tree"]
            assert (tree["state"], tree["context_mb"], tree["op"]) == ("frozen", CONTEXT_MB, None)
            assert free_mb(daemon) == 40 - CONTEXT_MB
            daemon.restart()
        if leaves_first:
            assert "context_mb" not in done(daemon, "freeze", name="tree")
            assert free_mb(daemon) == 40
        done(daemon, "thaw", name="tree")
        assert words() == [Word.RUNNING] * 2
        require_work()
    digests = {line.partition("digest=")[2].split()[0] for line in log.read_text().splitlines()}
    assert len(digests) == 1


def test_a_daemon_killed_at_any_moment_finds_what_was_kept(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    model = Workload.start(daemon, "model", "24M")
    for number in range(12):
        method, params = (("freeze", {"keep_context": True}), ("freeze", {}), ("thaw", {}))[
            number % 3
        ]
        killer = threading.Timer(rng.uniform(0.0, 0.06), daemon.kill9)
        killer.start()
        ask_quietly(daemon, method, name="model", **params)
        killer.join()
        daemon.start()
        state = model.entry["state"]
        context_mb = model.entry["context_mb"]
        assert context_mb in ((0, CONTEXT_MB) if state == "frozen" else (0,))
        model.require(state, context_mb=context_mb)
    done(daemon, "thaw", name="model")
    model.require("active")
    model.require_contents()


def test_a_migration_of_what_kept_its_context(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(gpus=2, vram="40M")
    model = Workload.start(daemon, "model", "24M")
    done(daemon, "freeze", name="model", keep_context=True)
    done(daemon, "migrate", name="model", gpu=1)
    model.require("active", gpu=1)
    model.require_contents()
    assert free_mb(daemon, 0) == 40


@pytest.mark.criu
@pytest.mark.root
def test_what_goes_to_disk_leaves_the_gpu_first(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="100M", args=["--ram-budget", "60M"])
    models = [Workload.start(daemon, f"m{n}", "24M", seed=n) for n in (1, 2, 3)]
    done(daemon, "freeze", name="m1", keep_context=True)
    done(daemon, "hibernate", name="m1")
    assert free_mb(daemon) == 100 - 48
    done(daemon, "thaw", name="m1")
    for model in models[:2]:
        done(daemon, "freeze", name=model.name, keep_context=True)
    # The third needs the RAM of the one that was used longest ago.
    result = done(daemon, "freeze", name="m3", keep_context=True)
    assert result["to_disk"] == ["m2"]
    assert free_mb(daemon) == 100 - 2 * CONTEXT_MB
    done(daemon, "thaw", name="m2")
    again(models[1]).require_contents()


@pytest.mark.criu
@pytest.mark.root
def test_copies_of_what_kept_its_context(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="100M")
    model = Workload.start(daemon, "model", "24M")
    done(daemon, "freeze", name="model", keep_context=True)
    result = done(daemon, "fork", name="model", copies=2)
    assert len(result["copies"]) == 2
    model.require("frozen")
    assert {entries(daemon)[name]["state"] for name in result["copies"]} == {"active"}
    done(daemon, "thaw", name="model")
    model.require_contents()


async def test_the_sdk_asks_for_it_and_says_what_is_kept(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="60M")
    a = Workload.start(daemon, "a", "24M", seed=1)
    client = daemon.client()
    assert client.freeze("a", keep_context=True)["context_mb"] == CONTEXT_MB
    b = Workload.start(daemon, "b", "24M", seed=2)
    off, on = client.swap("b", "a", keep_context=True)
    assert off["context_mb"] == CONTEXT_MB and on["name"] == "a"
    async with AsyncGpuSched(daemon.socket) as asynchronous:
        (off_async,), _ = await asynchronous.swap(["a"], ["b"], keep_context=True)
        assert off_async["context_mb"] == CONTEXT_MB
        assert (await asynchronous.freeze("b", keep_context=True))["context_mb"] == CONTEXT_MB
    for model in (a, b):
        client.thaw(model.name)
        model.require_contents()
