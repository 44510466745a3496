"""Models of Ray that somebody migrates to another GPU, as ``gpusched migrate`` does: their handles go on working."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from daemons import PrivateDaemon, wait_until
from gpusched import errors
from ray_cluster import await_no_hosts, get, states
from ray_integration import freezable, freeze, status, swap, thaw
from ray_models import Model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
MIB = 2**20
#: Two of these do not fit on one of the cluster's GPUs.
LARGE = 75 * MIB


@pytest.fixture
def on_gpu_1(cluster: PrivateDaemon) -> Iterator[Callable[[str], Any]]:
    """Makes large models on GPU 1; the fixture ``make`` has GPU 0."""
    made: list[Any] = []

    def model(name: str) -> Any:
        made.append(freezable(gpus=[1])(Model).options(name=name).remote(vram_bytes=LARGE))
        get(made[-1].__ray_ready__.remote())
        return made[-1]

    yield model
    for handle in made:
        ray.kill(handle)
    await_no_hosts(cluster, "neighbour", "fills")


def await_used(daemon: PrivateDaemon, wanted: list[int]) -> None:
    """In MiB, of each GPU. A figure of ``status`` may be a moment old."""

    def used() -> list[int]:
        return [gpu["mem_used_mb"] for gpu in daemon.client().status()["gpus"]]

    wait_until(lambda: used() == wanted, within_s=5, what=f"{wanted} MiB are in use")


@pytest.mark.parametrize("was", ["active", "frozen"])
def test_a_model_that_is_migrated_keeps_its_state_and_its_handle(
    was: str, make: Callable[..., Any], cluster: PrivateDaemon, hosts: Any
) -> None:
    model = make("moved", LARGE, max_restarts=1)
    get(model.add.remote(5))
    right, host = get(model.digest.remote()), hosts("moved")
    waiting: list[Any] = []
    for target in (1, 0, 1):
        if was == "frozen":
            get(freeze(model))
            waiting = [model.add.remote(n) for n in range(3)]
            assert ray.wait(waiting, timeout=0.3)[0] == []
        moved = cluster.client().migrate(host["name"], target)
        assert (moved["from_gpu"], moved["to_gpu"]) == (1 - target, target)
        get(waiting)  # it is on a GPU now, so they went on
        await_used(cluster, [0, LARGE // MIB][:: 1 if target else -1])
        assert get(model.digest.remote()) == right
    assert get(model.history.remote()) == [5, *(list(range(3)) * 3 if was == "frozen" else [])]
    assert hosts("moved")["pid"] == host["pid"]
    # What the driver says afterwards is about where it is now.
    get(freeze(model))
    await_used(cluster, [0, 0])
    get(thaw(model))
    await_used(cluster, [0, LARGE // MIB])
    # So does a proxy that knows only where Ray placed it.
    os.kill(get(status(model))["calls"]["proxy_pid"], signal.SIGKILL)
    wait_until(lambda: _answers(model), within_s=20, what="the proxy is restarted")
    assert (hosts("moved")["gpus"], get(model.digest.remote())) == ([1], right)


def _answers(model: Any) -> bool:
    try:
        return bool(get(model.history.remote()))
    except ray.exceptions.ActorUnavailableError:
        return False


@pytest.mark.slow
def test_a_call_under_way_stands_still_and_goes_on_elsewhere(
    make: Callable[..., Any], cluster: PrivateDaemon, hosts: Any
) -> None:
    model = make("busy", 8 * MIB)
    ref = model.slow_add.remote(1, 1.5)
    wait_until(
        lambda: get(status(model))["calls"]["under_way"] == 1, within_s=10, what="it is under way"
    )
    cluster.client().migrate(hosts("busy")["name"], 1)
    assert ray.wait([ref], timeout=0)[0] == [], "it was in its middle"
    assert get(ref) == 1
    assert get(model.contents.remote()) == b"first bytes"
    assert hosts("busy")["gpus"] == [1]


def test_room_is_made_where_a_model_is_now_not_where_it_was_made(
    make: Callable[..., Any], on_gpu_1: Callable[[str], Any], cluster: PrivateDaemon, hosts: Any
) -> None:
    model = make("wanted", LARGE, on_frozen="thaw")
    cluster.client().migrate(hosts("wanted")["name"], 1)
    get(freeze(model))
    elsewhere, neighbour = make("elsewhere", LARGE), on_gpu_1("neighbour")
    assert get(model.contents.remote()) == b"first bytes"
    assert states(model, neighbour, elsewhere) == ["active", "frozen", "active"]
    get(swap(model, neighbour))
    assert states(model, neighbour, elsewhere) == ["frozen", "active", "active"]


@pytest.mark.slow
def test_a_migration_that_does_not_fit_changes_nothing(
    make: Callable[..., Any], on_gpu_1: Callable[[str], Any], cluster: PrivateDaemon, hosts: Any
) -> None:
    model, other = make("stays", LARGE), on_gpu_1("fills")
    with pytest.raises(errors.InsufficientGpuMemory):
        cluster.client().migrate(hosts("stays")["name"], 1)
    assert states(model, other) == ["active", "active"]
    assert get(model.contents.remote()) == get(other.contents.remote()) == b"first bytes"
    assert hosts("stays")["gpus"] == [0]
