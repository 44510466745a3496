"""Contexts that a freeze leaves on the GPU: there for as long as there is room, and gone when anybody needs it."""

from __future__ import annotations

import random
import threading
import time

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon
from disk_tier import again, ask_quietly
from gpusched.aio import AsyncGpuSched
from gpusched.mechanisms.sim.control import CONTEXT_BYTES
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
    models = [Workload.start(daemon, f"m{n}", "16M", seed=n) for n in (1, 2, 3)]
    for model in models:
        done(daemon, "freeze", name=model.name, keep_context=True)
    large = Workload.start(daemon, "large", "46M", seed=9)
    done(daemon, "freeze", name="large")
    # 48 are free: one is needed, of the one that was used longest ago.
    extra = Workload.start(daemon, "extra", "4M", seed=10)
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
    assert free_mb(daemon) == 40 - CONTEXT_MB
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
    done(daemon, "freeze", name="kept", keep_context=True)
    Workload.start(daemon, "active", "24M", seed=3)
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


def test_a_swap_whose_contexts_cannot_go_is_taken_back(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    kept = Workload.start(daemon, "kept", "16M", seed=1)
    done(daemon, "freeze", name="kept", keep_context=True)
    waiting = Workload.start(daemon, "waiting", "30M", seed=2)
    done(daemon, "freeze", name="waiting")
    active = Workload.start(daemon, "active", "8M", seed=3)
    Script(daemon.sim_dir).add("checkpoint", pid=kept.pid, error="UNKNOWN")
    refused(daemon, "driver_error", "thaw", name="waiting")
    kept.require("frozen", context_mb=CONTEXT_MB)
    waiting.require("frozen")
    active.require_contents()
    done(daemon, "thaw", name="waiting")
    waiting.require_contents()


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
