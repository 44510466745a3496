"""Attached mode: plain Ray actors, frozen as they are; their workers are never stopped."""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from daemons import PrivateDaemon, wait_until
from gpusched import errors, preload, preload_env
from gpusched.mechanisms.sim import device
from gpusched.mechanisms.sim.script import Script
from ray_cluster import await_no_hosts, get, names, states
from ray_integration import (
    DrainTimeout,
    Phases,
    agent,
    attach,
    compat,
    freeze,
    hibernate,
    on_gpu,
    status,
    swap,
    thaw,
)

pytestmark = pytest.mark.ray
SIZE = 80 << 20  # two of them do not fit on a GPU


class Worker:
    """As a trainer's worker is, with VRAM of its own; it knows nothing of us."""

    def __init__(self, sim_dir: str, size: int) -> None:
        os.environ["GPUSCHED_SIM_DIR"] = sim_dir
        self.calls: list[int] = []
        self.vram = device.init().allocate(size) if size else None
        if self.vram is not None:
            self.vram.write(0, os.urandom(1 << 20))

    def digest(self) -> int:
        assert self.vram is not None
        with self.vram.access() as view:
            return zlib.crc32(view)

    def note(self, number: int) -> int:
        self.calls.append(number)
        return number

    def noted(self) -> list[int]:
        return self.calls

    def slow(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os._exit(1)


class AsyncWorker(Worker):
    async def wait(self, number: int, seconds: float) -> int:
        self.calls.append(number)
        await asyncio.sleep(seconds)
        self.calls.append(-number)
        return number


class Grouped(Worker):
    @ray.method(concurrency_group="io")
    def other(self) -> None: ...


@pytest.fixture
def plain(cluster: PrivateDaemon) -> Iterator[Callable[..., Any]]:
    """Makes plain actors; they are killed afterwards, and the daemon forgets them."""
    made = []

    def worker(cls: type = Worker, size: int = SIZE, **options: Any) -> Any:
        settings: Any = {"concurrency_groups": {"io": 1}} if cls is Grouped else {}
        actor: Any = ray.remote(num_cpus=0, **settings)(cls)
        made.append(actor.options(**options).remote(str(cluster.sim_dir), size))
        get(made[-1].__ray_ready__.remote())
        return made[-1]

    yield worker
    for handle in made:
        ray.kill(handle)
    made.clear()
    await_no_hosts(cluster, "trainer-", "Worker-", "AsyncWorker-")


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def is_pending(ref: Any) -> bool:
    return not ray.wait([ref], timeout=0.3)[0]


def pid_of(actor: Any) -> int:
    facts = compat.actor_facts(compat.actor_id(actor))
    return facts["pid"] if facts is not None and facts["state"] == "ALIVE" else 0


def answers(actor: Any) -> bool:
    try:
        return bool(get(actor.node_id.remote()))
    except ray.exceptions.ActorUnavailableError:
        return False


def used_mb(daemon: PrivateDaemon) -> int:
    return daemon.client().status()["gpus"][0]["mem_used_mb"]


def test_a_plain_actor_is_frozen_and_thawed_and_never_stopped(
    plain: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    worker = plain(name="trainer")
    pid, digest = get(worker.pid.remote()), get(worker.digest.remote())
    found = get(attach(worker))
    assert (found["pid"], found["state"], found["stop"]) == (pid, "active", False)
    assert found["name"].startswith("trainer-")
    assert get(attach([worker]))[0]["name"] == found["name"]  # again: nothing happens
    for _ in range(3):
        assert get(freeze(worker))["mem_mb"] == SIZE >> 20
        assert used_mb(cluster) == 0
        assert not is_stopped(pid)
        assert get(worker.note.remote(1)) == 1, "a call that needs no VRAM is answered"
        waiting = worker.digest.remote()
        assert is_pending(waiting)
        assert get(status("trainer"))["state"] == "frozen"
        get(thaw(worker))
        assert get(waiting) == digest
        assert used_mb(cluster) == SIZE >> 20
    # As one that is adopted; a node without a disk tier says that first.
    with pytest.raises(errors.Unsupported, match=r"adopted|hibernate is not possible here"):
        get(hibernate(worker))
    assert get(worker.digest.remote()) == digest


@pytest.mark.skipif(not preload.library(), reason="the library was not built")
def test_a_worker_may_be_started_with_the_library(plain: Callable[..., Any]) -> None:
    """What that is good for is seen on a GPU alone: tests/gpu/test_ray_gpu.py."""
    worker = plain(runtime_env={"env_vars": preload_env()})
    digest = get(worker.digest.remote())
    found = get(attach(worker))
    assert preload.library() in Path(f"/proc/{found['pid']}/maps").read_text()
    get(freeze(worker))
    get(thaw(worker))
    assert get(worker.digest.remote()) == digest


def test_calls_under_way_end_first_and_later_ones_wait_in_order(plain: Callable[..., Any]) -> None:
    worker = plain()
    get(attach(worker))
    slow = worker.slow.remote(1.0)
    frozen = freeze(worker)
    later = [worker.note.remote(number) for number in range(20)]
    get(frozen)
    assert ray.wait([slow], timeout=0)[0], "the call under way had ended before the freeze"
    get(thaw(worker))
    get(later)
    assert get(worker.noted.remote()) == list(range(20))


@pytest.mark.parametrize("slots", [1, 3])
def test_a_call_that_does_not_end_stops_the_freeze(plain: Callable[..., Any], slots: int) -> None:
    worker = plain(max_concurrency=slots)
    digest = get(worker.digest.remote())
    get(attach(worker))
    slow = [worker.slow.remote(3.0) for _ in range(slots)]
    with pytest.raises(DrainTimeout):
        get(freeze(worker, timeout_s=0.3))
    assert states(worker) == ["active"]
    get(freeze(worker, drain=False))
    assert states(worker) == ["frozen"]
    get(thaw(worker))
    assert get(slow) == [3.0] * slots
    assert get(worker.digest.remote()) == digest


def test_threads_of_an_actor_are_all_drained(plain: Callable[..., Any]) -> None:
    worker = plain(max_concurrency=3)
    get(attach(worker))
    slow = [worker.slow.remote(seconds) for seconds in (0.2, 0.6, 1.0)]
    get(freeze(worker))
    assert len(ray.wait(slow, num_returns=3, timeout=0)[0]) == 3
    get(thaw(worker))
    assert get([worker.note.remote(n) for n in range(6)]) == list(range(6)), "all slots are free"


def test_calls_of_an_event_loop_are_drained(plain: Callable[..., Any]) -> None:
    worker = plain(AsyncWorker)
    digest = get(worker.digest.remote())
    get(attach(worker))
    under_way = [worker.wait.remote(number, 1.0) for number in (1, 2)]
    # Ray promises no order for calls of an event loop.
    wait_until(
        lambda: sorted(get(worker.noted.remote())) == [1, 2], within_s=5, what="both have begun"
    )
    frozen = freeze(worker)
    time.sleep(0.3)  # it drains now
    later = worker.wait.remote(3, 0.0)
    get(frozen)
    get([*under_way, later])
    noted = get(worker.noted.remote())
    assert noted.index(3) > max(noted.index(-1), noted.index(-2)), "it waited for the freeze"
    get(thaw(worker))
    assert get(worker.digest.remote()) == digest


def test_attached_and_hosted_models_take_turns(
    make: Callable[..., Any], plain: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    worker = plain()
    digest = get(worker.digest.remote())
    get(attach(worker))
    get(freeze(worker))
    model = make("model", SIZE)
    off, on = get(swap(model, worker))
    assert (off["mem_mb"], on["mem_mb"]) == (SIZE >> 20, SIZE >> 20)
    assert get(worker.digest.remote()) == digest
    phases = Phases({"rollout": [model], "train": [worker]})
    for _ in range(2):
        phases.phase("rollout")
        assert states(model, worker) == ["active", "frozen"]
        assert get(model.contents.remote()) == b"first bytes"
        phases.phase("train")
        assert states(model, worker) == ["frozen", "active"]
        assert get(worker.digest.remote()) == digest
    get(freeze(worker))
    with on_gpu(worker), pytest.raises(errors.LeaseHeld):
        get(freeze(worker))


def test_what_could_not_come_back_is_refused_untouched(
    plain: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    worker = plain()
    digest = get(worker.digest.remote())
    get(attach(worker))
    script = Script(cluster.sim_dir)
    script.add("obstacles", obstacle={"kind": "nccl", "message": "it holds NCCL P2P memory"})
    try:
        with pytest.raises(errors.Unsupported, match="NCCL P2P"):
            get(freeze(worker))
    finally:
        script.clear()
    assert states(worker) == ["active"]
    assert get(worker.digest.remote()) == digest, "its slots are free again"


def test_who_cannot_be_attached(make: Callable[..., Any], plain: Callable[..., Any]) -> None:
    with pytest.raises(errors.Unsupported, match="concurrency groups"):
        get(attach(plain(Grouped, 0)))
    with pytest.raises(errors.InvalidRequest, match="freezable"):
        get(attach(make("model")))
    busy = plain(size=0)
    busy.slow.remote(3.0)
    with pytest.raises(errors.DeadlineExceeded):
        get(attach(busy, timeout_s=0.3))
    dead = plain(size=0)
    ray.kill(dead)
    wait_until(
        lambda: (compat.actor_facts(compat.actor_id(dead)) or {})["state"] == "DEAD",
        within_s=10,
        what="it is dead",
    )
    with pytest.raises(errors.NotFound, match="dead"):
        get(attach(dead))


def test_being_attached_does_not_keep_an_actor_alive(
    plain: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    worker = ray.remote(num_cpus=0)(Worker).remote(str(cluster.sim_dir), SIZE)
    name = get(attach(worker))["name"]
    get(freeze(worker))
    assert name in names(cluster)
    del worker
    await_no_hosts(cluster, name, within_s=20)


def test_a_restarted_actor_is_followed(plain: Callable[..., Any], cluster: PrivateDaemon) -> None:
    worker = plain(max_restarts=1)
    first = get(attach(worker))
    worker.die.remote()

    def second() -> Any:
        return next(p for p in cluster.client().processes() if p["name"] == first["name"])

    wait_until(
        lambda: second()["pid"] != first["pid"] and second()["state"] == "active",
        within_s=20,
        what="the new worker is attached",
    )
    digest = get(worker.digest.remote())
    get(freeze(worker))
    assert used_mb(cluster) == 0
    get(thaw(worker))
    assert get(worker.digest.remote()) == digest


def test_an_agent_that_died_is_replaced(plain: Callable[..., Any], cluster: PrivateDaemon) -> None:
    worker = plain()
    digest = get(worker.digest.remote())
    get(attach(worker))
    get(freeze(worker))
    its_agent = agent.handle(ray.get_runtime_context().get_node_id())
    old = pid_of(its_agent)
    ray.kill(its_agent, no_restart=False)
    wait_until(
        lambda: pid_of(its_agent) not in (0, old) and answers(its_agent),
        within_s=20,
        what="there is a new agent",
    )
    get(thaw(worker))
    assert get(worker.digest.remote()) == digest
    slow = worker.slow.remote(1.0)
    get(freeze(worker))
    assert ray.wait([slow], timeout=0)[0], "the new agent drains as the old one did"
    get(thaw(worker))


def test_a_worker_that_is_killed_while_frozen_is_forgotten(
    plain: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    worker = plain()
    name = get(attach(worker))["name"]
    get(freeze(worker))
    ray.kill(worker)
    await_no_hosts(cluster, name, within_s=15)
    assert used_mb(cluster) == 0
