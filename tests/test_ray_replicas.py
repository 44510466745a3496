"""Copies of hosted models as replicas: each with an actor, a socket and a state of its own, made by a real fork."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from daemons import PrivateDaemon, wait_until
from gpusched import errors
from ray_cluster import await_no_hosts, get, states
from ray_integration import copies, fork, freeze, hibernate, status, swap, thaw
from ray_integration.frames import ConnectionLost, check_peer
from ray_models import AsyncModel

pytestmark = [
    pytest.mark.ray,
    pytest.mark.criu,
    pytest.mark.root,
    pytest.mark.usefixtures("cluster"),
]
MIB = 2**20


@pytest.fixture
def replicate(cluster: PrivateDaemon) -> Iterator[Callable[..., list[Any]]]:
    """``fork``, whose replicas are killed afterwards."""
    made: list[Any] = []

    def call(model: Any, *args: Any, **options: Any) -> list[Any]:
        replicas: list[Any] = fork(model, *args, **options)
        made.extend(replicas)
        return replicas

    yield call
    for handle in made:
        ray.kill(handle)


def pids(*handles: Any) -> list[int]:
    return [each["pid"] for each in get(status(list(handles)))]


def names(daemon: PrivateDaemon) -> list[str]:
    found = [process["name"] for process in daemon.client().processes()]
    return [name for name in found if not name.startswith("ray-keeper")]


def test_replicas_have_the_state_of_that_moment_and_go_their_own_ways(
    make: Callable[..., Any], replicate: Callable[..., list[Any]], cluster: PrivateDaemon
) -> None:
    model = make("policy", 8 * MIB)
    get(model.add.remote(5))
    one, two = replicate(model, copies=2, gpus=[1, 0])
    assert get([handle.add.remote(n) for n, handle in enumerate((model, one, two))]) == [5, 6, 7]
    assert get([handle.contents.remote() for handle in (model, one, two)]) == [b"first bytes"] * 3
    found = get(status([model, one, two]))
    assert [each["gpu"] for each in found] == [0, 1, 0]
    original = found[0]["name"]
    assert [each["name"] for each in found[1:]] == [f"{original}-1", f"{original}-2"]
    assert len(set(pids(model, one, two))) == 3
    # All that can be done with a model can be done with them, also what connects anew.
    get(swap(model, one))
    assert states(model, one, two) == ["frozen", "active", "active"]
    get(freeze([one, two]))
    get(thaw([model, one, two]))
    assert get([handle.add.remote(0) for handle in (model, one, two)]) == [5, 6, 7]
    get(hibernate(two))
    get(thaw(two))
    assert get([handle.add.remote(0) for handle in (model, one, two)]) == [5, 6, 7]
    large = b"x" * (4 * MIB)
    assert get(two.echo.remote(large)) == large
    # A replica's replica; and an actor that is gone takes its copy along, and nobody else.
    (third,) = replicate(two, copies=1)
    assert get(third.add.remote(0)) == 7
    ray.kill(one)
    await_no_hosts(cluster, f"{original}-1")
    assert get([handle.add.remote(0) for handle in (model, two, third)]) == [5, 7, 7]


@pytest.mark.slow
def test_a_frozen_model_stays_frozen_and_its_replicas_run(
    make: Callable[..., Any], replicate: Callable[..., list[Any]]
) -> None:
    model = make("frozen", 8 * MIB)
    get(model.add.remote(3))
    get(freeze(model))
    (replica,) = replicate(model, copies=1)
    assert states(model, replica) == ["frozen", "active"]
    assert get(replica.add.remote(1)) == 4
    waiting = model.add.remote(2)
    assert ray.wait([waiting], timeout=0.3)[0] == []
    get(thaw(model))
    assert get(waiting) == 5


def test_a_copy_that_a_person_makes_takes_nothing_from_the_original(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    model = make("taken", 8 * MIB)
    get(model.add.remote(1))
    get(freeze(model))  # which ends the connection that would be in the way
    (found,) = get(status([model]))
    (name,) = cluster.client().fork(found["name"], 1)["copies"]
    get(thaw(model))
    assert get(model.where.remote())["pid"] == 1000, "as its own namespace counts"
    assert pids(model) == [found["pid"]]
    assert get(model.add.remote(1)) == 2
    cluster.client().kill(name)
    assert get(model.add.remote(1)) == 3


@pytest.mark.slow
def test_a_class_with_async_methods_and_hooks_has_replicas_too(
    make: Callable[..., Any], replicate: Callable[..., list[Any]]
) -> None:
    model = make("async", cls=HookedAsync)
    (replica,) = replicate(model, copies=1)
    for handle in (model, replica):
        assert get([handle.wait.remote(0.01) for _ in range(3)]) == [0.01] * 3
        wait_until(
            lambda h=handle: get(h.said.remote()) == ["before_freeze", "after_thaw"],  # type: ignore[misc]
            within_s=10,
            what="both were called, in the copy too",
        )


class HookedAsync(AsyncModel):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def said(self) -> list[str]:
        return self.calls

    def before_freeze(self) -> None:
        self.calls.append("before_freeze")

    def after_thaw(self) -> None:
        self.calls.append("after_thaw")


@pytest.mark.slow
def test_a_replica_whose_proxy_is_restarted_finds_its_copy_again(
    make: Callable[..., Any], replicate: Callable[..., list[Any]]
) -> None:
    model = make("again", 8 * MIB)
    get(model.add.remote(2))
    (replica,) = replicate(model, copies=1, max_restarts=1)
    before = pids(replica)
    (found,) = get(status([replica]))
    os.kill(found["calls"]["proxy_pid"], signal.SIGKILL)
    wait_until(lambda: _answers(replica) == 2, within_s=30, what="the restarted proxy answers")
    assert pids(replica) == before


def _answers(handle: Any) -> int | None:
    try:
        return int(get(handle.add.remote(0)))
    except ray.exceptions.RayActorError:
        return None


def test_what_cannot_be_copied_is_refused_and_leaves_no_copy(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    model = make("large", 75 * MIB)
    before = names(cluster)
    with pytest.raises(errors.InsufficientGpuMemory):
        fork(model, copies=1)
    outside = make("outside", 8 * MIB, isolate=False)
    with pytest.raises(errors.Unsupported):
        fork(outside)
    with pytest.raises(errors.InvalidRequest, match="takes one model, not 2"):
        fork([model, outside])
    assert set(names(cluster)) == {*before, *(each["name"] for each in get(status([outside])))}
    assert get([model.add.remote(), outside.add.remote()]) == [1, 1]


def test_a_copy_that_gets_no_actor_is_ended(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    model = make("lonely", 8 * MIB)
    get(freeze(model))
    (found,) = get(status([model]))
    waiting = copies.Unclaimed()
    client = cluster.client()
    waiting.timeout_s = 0.0
    two = waiting.fork(client, found["name"], 2, None, force=False)
    assert set(two) <= set(names(cluster))
    waiting.end_due(client, claimed=two[:1])
    assert set(names(cluster)) & set(two) == {two[0]}
    waiting.end_due(client, claimed=[])
    client.kill(two[0])


def test_the_socket_of_a_host_is_its_users_alone(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    (found,) = get(status([make("private")]))
    path = Path(f"/proc/{found['pid']}/root/dev/shm/gpusched-host")
    assert path.is_socket()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("peer", "own", "accepted"), [(0, 65534, True), (65534, 0, False)])
def test_a_peer_may_be_root_which_listens_for_its_user_after_a_restore(
    peer: int, own: int, accepted: bool
) -> None:
    """Of another user's nothing is believed. ``peer`` made the pair; the other end is looked at as ``own``."""
    pid = os.fork()
    if pid == 0:
        os.seteuid(peer)
        ends = socket.socketpair()
        os.seteuid(0)
        os.seteuid(own)
        try:
            check_peer(ends[0])
        except ConnectionLost:
            os._exit(1)
        os._exit(0)
    assert (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0) is accepted
