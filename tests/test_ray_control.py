"""Freeze, thaw, swap and their like, said by the driver: what moves, what waits, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from daemons import PrivateDaemon, wait_until
from gpusched import errors
from gpusched.mechanisms.sim.script import Script
from ray_cluster import get, states
from ray_integration import (
    DrainTimeout,
    ModelFrozen,
    Phases,
    freeze,
    group,
    hibernate,
    on_gpu,
    status,
    swap,
    thaw,
)
from ray_models import AsyncModel, Model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
MIB = 2**20
#: Two of these do not fit on one of the cluster's GPUs.
LARGE = 75 * MIB


@pytest.fixture
def pair(make: Callable[..., Any]) -> tuple[Any, Any]:
    """Two that do not fit together: the first is off, the second on."""
    return make("off", LARGE, start_frozen=True), make("on", LARGE)


def test_twenty_calls_on_a_frozen_model_run_in_their_order_after_the_thaw(
    make: Callable[..., Any],
) -> None:
    model = make("queue", 8 * MIB)
    frozen = get(freeze(model))
    assert (frozen["tier"], frozen["mem_mb"]) == ("ram", 8)
    refs = [model.add.remote(i) for i in range(20)]
    assert ray.wait(refs, num_returns=1, timeout=0.5)[0] == []
    found = get(status(model))
    assert (found["state"], found["tier"], found["calls"]["gate"]) == ("frozen", "ram", "frozen")
    assert get(thaw(model))["from_tier"] == "ram"
    assert get(refs) == [sum(range(i + 1)) for i in range(20)]
    assert get(model.history.remote()) == list(range(20))
    assert get(model.contents.remote()) == b"first bytes"


def test_a_swap_is_one_operation_of_the_daemon(
    pair: tuple[Any, Any], cluster: PrivateDaemon
) -> None:
    off, on = pair
    before = cluster.client().status()["metrics"]["requests"]
    gone, come = get(swap(on, off))
    assert (gone["tier"], come["from_tier"]) == ("ram", "ram")
    assert states(off, on) == ["active", "frozen"]
    events = [e for e in cluster.client().status()["recent_events"] if e["type"] == "thaw"]
    assert events[-1]["process"] == come["name"]
    assert cluster.client().status()["metrics"]["requests"] - before < 60  # no polling either
    waiting = on.contents.remote()
    get(swap(off, on))
    assert get(waiting) == b"first bytes"


def test_a_swap_that_cannot_be_leaves_all_as_it_was(
    pair: tuple[Any, Any], make: Callable[..., Any]
) -> None:
    off, on = pair
    small = make("small", 8 * MIB)
    with pytest.raises(errors.InsufficientGpuMemory) as refused:
        get(swap(small, off))
    assert refused.value.cause.details["gpus"]  # type: ignore[attr-defined]
    assert states(off, on, small) == ["frozen", "active", "active"]
    assert get(small.add.remote()) == 1


def test_a_swap_that_fails_at_its_end_is_taken_back_whole(
    pair: tuple[Any, Any], cluster: PrivateDaemon
) -> None:
    off, on = pair
    script = Script(cluster.sim_dir)
    host = get(status(off))["pid"]
    script.add("restore", pid=host, when="middle", error="OUT_OF_MEMORY")
    try:
        with pytest.raises(errors.GpuschedError):
            get(swap(on, off))
        assert script.fired("restore"), "the other one was off by then"
    finally:
        script.clear()
    assert states(off, on) == ["frozen", "active"]
    waiting = off.contents.remote()
    assert get(on.contents.remote()) == b"first bytes"
    get(swap(on, off))
    assert get(waiting) == b"first bytes"


def test_everything_can_be_awaited(pair: tuple[Any, Any]) -> None:
    off, on = pair

    async def drive() -> list[Any]:
        gone, come = await swap(on, off)
        frozen = await freeze(off)
        thawed, called = await asyncio.gather(thaw(on), on.contents.remote())
        assert (await status([on]))[0]["state"] == "active"
        with pytest.raises(errors.InsufficientGpuMemory):
            await thaw(off)
        return [gone["tier"], come["from_tier"], frozen["tier"], thawed["from_tier"], called]

    found = asyncio.run(asyncio.wait_for(drive(), 30))
    assert found == ["ram", "ram", "ram", "ram", b"first bytes"]


def test_a_list_goes_off_and_comes_on_as_one(
    pair: tuple[Any, Any], make: Callable[..., Any]
) -> None:
    off, on = pair
    small = make("small", 8 * MIB)
    assert [each["tier"] for each in get(freeze([on, small]))] == ["ram", "ram"]
    with pytest.raises(errors.InsufficientGpuMemory):
        get(thaw([off, on, small]))
    assert states(off, on, small) == ["frozen"] * 3
    group("both", [on, small])
    assert len(get(thaw("both"))) == 2
    assert states(off, on, small) == ["frozen", "active", "active"]
    assert get(freeze("small"))["tier"] == "ram"  # a named actor


def test_calls_under_way_end_before_a_freeze(make: Callable[..., Any]) -> None:
    model = make("drained")
    slow = model.slow_add.remote(1, 1.0)
    later = model.add.remote(1)
    wait_until(lambda: get(status(model))["calls"]["under_way"], within_s=10, what="it is called")
    with pytest.raises(DrainTimeout, match=r"still under way after 0\.2 s"):
        get(freeze(model, timeout_s=0.2))
    assert states(model) == ["active"]
    get(freeze(model))
    assert ray.wait([slow], timeout=0)[0] == [slow], "it ended before the freeze"
    get(thaw(model))
    assert get([slow, later]) == [1, 2]


def test_without_a_drain_a_call_stands_still_in_its_middle(make: Callable[..., Any]) -> None:
    model = make("undrained")
    slow = model.slow_add.remote(1, 0.6)
    wait_until(lambda: get(status(model))["calls"]["under_way"], within_s=10, what="it is called")
    get(freeze(model, drain=False))
    assert ray.wait([slow], timeout=1.0)[0] == []
    get(thaw(model))
    assert get(slow) == 1


def test_a_call_on_a_frozen_model_is_refused_if_it_was_made_so(make: Callable[..., Any]) -> None:
    model = make("refuser", on_frozen="raise")
    get(freeze(model))
    with pytest.raises(ModelFrozen, match="is frozen, and its policy is to refuse"):
        get(model.add.remote())
    get(thaw(model))
    assert get(model.add.remote()) == 1, "the refused one was not executed"


def test_a_call_thaws_its_model_and_an_idle_one_goes_off_for_it(
    make: Callable[..., Any],
) -> None:
    first = make("first", LARGE, on_frozen="thaw", start_frozen=True)
    second = make("second", LARGE, on_frozen="thaw")
    assert get(first.contents.remote()) == b"first bytes"
    assert states(first, second) == ["active", "frozen"]
    busy = first.slow_add.remote(1, 1.0)
    wait_until(lambda: get(status(first))["calls"]["under_way"], within_s=10, what="it is called")
    with pytest.raises(errors.InsufficientGpuMemory):
        get(second.contents.remote())
    assert get(busy) == 1
    assert get(second.contents.remote()) == b"first bytes"
    assert states(first, second) == ["frozen", "active"]


def test_calls_of_a_class_with_async_methods_wait_and_can_be_cancelled(
    make: Callable[..., Any],
) -> None:
    model = make("async", cls=AsyncModel)
    get(freeze(model))
    refs = [model.wait.remote(0.01) for _ in range(5)]
    assert ray.wait(refs, num_returns=1, timeout=0.5)[0] == []
    ray.cancel(refs[2])
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(refs[2])
    get(thaw(model))
    assert get([ref for ref in refs if ref != refs[2]]) == [0.01] * 4


def test_a_queued_call_can_be_cancelled_and_is_not_executed(make: Callable[..., Any]) -> None:
    model = make("cancelling")
    get(freeze(model))
    head = model.add.remote(100)
    time.sleep(0.3)
    ray.cancel(head)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(head, timeout=10)
    get(thaw(model))
    assert get(model.add.remote(1)) == 1


def test_what_a_person_does_at_the_command_line_counts_too(
    make: Callable[..., Any], cluster: PrivateDaemon, hosts: Any
) -> None:
    model = make("cli")
    name = hosts("cli")["name"]
    cluster.client().freeze(name)
    wait_until(
        lambda: get(status(model))["calls"]["gate"] == "frozen", within_s=5, what="the proxy knows"
    )
    ref = model.add.remote()
    assert ray.wait([ref], timeout=0.3)[0] == []
    cluster.client().thaw(name)
    assert get(ref) == 1


def test_on_gpu_brings_models_on_and_keeps_them_there(pair: tuple[Any, Any]) -> None:
    off, on = pair
    with on_gpu(off):
        assert states(off, on) == ["active", "frozen"]
        with pytest.raises(errors.LeaseHeld):
            get(freeze(off))
        with pytest.raises(errors.InsufficientGpuMemory), on_gpu(on):
            pass
        assert get(off.contents.remote()) == b"first bytes"
    get(swap(off, on))
    with pytest.raises(errors.InsufficientGpuMemory), on_gpu(off, evict=False):
        pass
    assert states(off, on) == ["frozen", "active"]


def test_phases_bring_exactly_their_models_on(
    pair: tuple[Any, Any], make: Callable[..., Any]
) -> None:
    policy, reward = pair
    reference = make("reference", 8 * MIB)
    phases = Phases({"rollout": [policy], "score": [reward, reference], "train": policy})
    with phases.phase("rollout") as phase:
        assert states(policy, reward, reference) == ["active", "frozen", "frozen"]
        assert (len(phase.on), len(phase.off)) == (1, 2)
        assert phase.duration_s > 0
    phases.phase("score")
    assert states(policy, reward, reference) == ["frozen", "active", "active"]
    phases.phase("train")
    assert states(policy, reward, reference) == ["active", "frozen", "frozen"]
    with pytest.raises(errors.InvalidRequest, match="no phase is named 'eval'"):
        phases.phase("eval")


@pytest.mark.criu
def test_a_model_on_disk_comes_back_with_its_state_and_its_calls(make: Callable[..., Any]) -> None:
    model = make("cold", 8 * MIB)
    get(model.add.remote(5))
    assert get(hibernate(model))["tier"] == "disk"
    assert states(model) == ["hibernated"]
    ref = model.add.remote(1)
    assert ray.wait([ref], timeout=0.3)[0] == []
    assert get(thaw(model))["from_tier"] == "disk"
    assert get(ref) == 6
    assert get(model.contents.remote()) == b"first bytes"


def test_what_the_node_cannot_do_is_unsupported_and_changes_nothing(
    make: Callable[..., Any],
) -> None:
    model = make("warm", 8 * MIB, isolate=False)
    get(model.add.remote(5))
    with pytest.raises(errors.Unsupported):
        get(hibernate(model))
    assert states(model) == ["active"]
    assert get(model.add.remote(0)) == 5


def test_what_is_no_model_is_named(make: Callable[..., Any], cluster: PrivateDaemon) -> None:
    with pytest.raises(errors.InvalidRequest, match="neither a handle"):
        freeze(3)
    plain: Any = ray.remote(Model).remote()
    get(plain.add.remote())
    with pytest.raises(errors.NotFound, match=r"is a plain actor: make its class freezable, or at"):
        get(freeze(plain), timeout=10)  # at once: waiting makes no difference
    late: Any = ray.remote(resources={"what nobody has": 1})(Model).remote()
    with pytest.raises(errors.DeadlineExceeded, match=r"after 0\.5 s: is there room for it"):
        get(freeze(late, timeout_s=0.5))
    model = make("dead")
    ray.kill(model)
    names = cluster.client().processes
    gone = [f"dead-{model._actor_id.hex()[:12]}"]
    wait_until(
        lambda: not [p for p in names() if p["name"] in gone], within_s=10, what="its host is gone"
    )
    with pytest.raises(errors.NotFound, match="is dead"):
        get(freeze(model))
