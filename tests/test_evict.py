"""``thaw`` with evict: who has to go, who may stay, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daemons import PrivateDaemon
from gpusched.mechanisms.sim.script import Script
from live import (
    ALICE,
    MALLORY,
    Line,
    ask,
    ask_as,
    error_of,
    others_workload,
    process,
    prove_contents,
    running,
    start,
    state,
    wait_ready,
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    """One GPU with room for three of the workloads."""
    with running(vram="30M") as daemon:
        yield daemon


@pytest.fixture
def four(daemon: PrivateDaemon) -> Iterator[list[str]]:
    """The frozen d, and a, b and c, which fill the GPU: c used least recently, then a, then b."""
    for name in "dabc":
        start(daemon, name, "8M")
        if name == "d":
            ask(daemon, "freeze", name="d")
    for name in "cab":
        ask(daemon, "freeze", name=name)
        ask(daemon, "thaw", name=name)
    yield list("abcd")
    Script(daemon.sim_dir).clear()
    for name in "abcd":
        ask(daemon, "kill", name=name, force=True)


def states(daemon: PrivateDaemon) -> dict[str, str]:
    return {p["name"]: p["state"] for p in ask(daemon, "status")["processes"]}


@pytest.mark.usefixtures("four")
def test_the_least_recently_used_goes(daemon: PrivateDaemon) -> None:
    answer = error_of(daemon, "thaw", name="d")
    assert answer["code"] == "insufficient_gpu_memory" and answer["retryable"]
    assert answer["details"]["gpus"][0]["missing_bytes"] == 2 * 2**20
    result = ask(daemon, "thaw", name="d", evict=True)
    assert (result["evicted"], result["from_tier"]) == (["c"], "ram")
    assert states(daemon) == {"a": "active", "b": "active", "c": "frozen", "d": "active"}
    assert "evict" in [e["type"] for e in ask(daemon, "status")["recent_events"]]
    # Now a is the least recently used, and so on: a full circle, and every byte is where it was.
    assert ask(daemon, "thaw", name="c", evict=True)["evicted"] == ["a"]
    assert ask(daemon, "thaw", name="a", evict=True)["evicted"] == ["b"]
    for name in "dca":
        prove_contents(daemon, name)
    assert ask(daemon, "thaw", name="b", evict=True)["evicted"] == ["d"]
    prove_contents(daemon, "b")


@pytest.mark.usefixtures("four")
def test_nobody_goes_when_there_is_room(daemon: PrivateDaemon) -> None:
    ask(daemon, "freeze", name="a")
    assert "evicted" not in ask(daemon, "thaw", name="d", evict=True)


@pytest.mark.usefixtures("four")
def test_leased_ones_stay(daemon: PrivateDaemon) -> None:
    with Line(daemon.socket) as holder:
        holder.result("acquire", name="c")
        ask(daemon, "acquire", name="a", for_s=100)
        assert ask(daemon, "thaw", name="d", evict=True)["evicted"] == ["b"]
        holder.result("acquire", name="d")
        answer = error_of(daemon, "thaw", name="b", evict=True)
        assert answer["code"] == "insufficient_gpu_memory"
    assert states(daemon)["b"] == "frozen"
    ask(daemon, "release", name="a")


@pytest.mark.usefixtures("four")
def test_acquire_evicts_too_and_keeps_what_it_got(daemon: PrivateDaemon) -> None:
    with Line(daemon.socket) as holder:
        result = holder.result("acquire", name="d", evict=True)
        assert result["evicted"] == ["c"]
        assert process(daemon, "d")["leases"] == 1


@pytest.mark.usefixtures("four")
def test_a_failing_thaw_brings_the_evicted_back(daemon: PrivateDaemon) -> None:
    pid = process(daemon, "d")["pid"]
    Script(daemon.sim_dir).add("restore", pid=pid, times=None, error="UNKNOWN")
    before = states(daemon)
    answer = error_of(daemon, "thaw", name="d", evict=True)
    assert answer["code"] == "driver_error" and "rolled back" in answer["error"]
    assert states(daemon) == before
    prove_contents(daemon, "c")
    Script(daemon.sim_dir).clear()
    assert ask(daemon, "thaw", name="d", evict=True)["evicted"] == ["a"]
    prove_contents(daemon, "d")


@pytest.mark.usefixtures("four")
def test_a_failing_eviction_leaves_everything(daemon: PrivateDaemon) -> None:
    pid = process(daemon, "c")["pid"]
    Script(daemon.sim_dir).add("checkpoint", pid=pid, error="OUT_OF_MEMORY")
    before = states(daemon)
    assert error_of(daemon, "thaw", name="d", evict=True)["code"] == "driver_error"
    assert states(daemon) == before
    prove_contents(daemon, "c")


@pytest.mark.root
def test_only_ones_own_and_the_evictable_go(daemon: PrivateDaemon) -> None:
    def run_as(uid: int, name: str, *, evictable: bool = False) -> None:
        params = {"name": name, "evictable": evictable, **others_workload("8M")}
        answer = ask_as(uid, daemon.socket, "run", **params)
        assert answer["ok"], answer
        wait_ready(daemon, name)

    run_as(ALICE, "mine")
    assert ask_as(ALICE, daemon.socket, "freeze", name="mine")["ok"]
    run_as(MALLORY, "hers-too")
    run_as(MALLORY, "hers")
    run_as(ALICE, "filler")
    ask(daemon, "acquire", name="filler", for_s=100)
    answer = ask_as(ALICE, daemon.socket, "thaw", name="mine", evict=True)
    assert answer["code"] == "insufficient_gpu_memory", answer
    assert (state(daemon, "hers"), state(daemon, "hers-too")) == ("active", "active")
    ask(daemon, "kill", name="hers")
    run_as(MALLORY, "hers", evictable=True)  # the most recently used, but the only one that may go
    answer = ask_as(ALICE, daemon.socket, "thaw", name="mine", evict=True)
    assert answer["ok"], answer
    assert answer["result"]["evicted"] == ["hers"]
    for name in ("mine", "hers", "hers-too", "filler"):
        ask(daemon, "kill", name=name, force=True)
