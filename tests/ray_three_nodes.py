"""Three nodes with a daemon each, on one machine: models moved over all of them while daemons and nodes come and go.

A program of its own (``python ray_three_nodes.py``), because a process can be in one Ray cluster only. Ends with 0 and
"all right", or with the first assertion that did not hold. Run by ``test_ray_nodes.py``.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from daemons import ROOT, PrivateDaemon, wait_until
from gpusched import errors
from gpusched.mechanisms.sim import device
from gpusched.mechanisms.sim.script import Script
from ray_cluster import await_no_hosts, get, states
from ray_integration import agent, compat, freezable, freeze, status, swap, thaw
from ray_models import Model, Rank

#: Seconds of Ray's keepalive, in minutes by default: in the environment that this program is started with.
KEEPALIVE_S = 3
ANSWER_S = 2
ENVIRONMENT = {
    "RAY_grpc_client_keepalive_time_ms": str(KEEPALIVE_S * 1000),
    "RAY_grpc_client_keepalive_timeout_ms": str(ANSWER_S * 1000),
}
SIZE = 40 * 2**20  # two do not fit on a node's GPU
#: "Hosts gone within 10 s of their actor's final death."
GONE_S = 10.0


class Nodes:
    """The cluster, and which daemon each node has. ``node(0)`` is the head."""

    def __init__(self, daemons: list[PrivateDaemon], directory: str) -> None:
        os.environ["GPUSCHED_RAY_DIR"] = directory
        # The checkout that this is in, whatever is installed and wherever it is started.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.daemons = daemons
        self._cluster: Any = Cluster()
        self._nodes: list[Any] = []
        for _ in daemons:
            self.append()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=40)

    def add(self, number: int) -> Any:
        return self._cluster.add_node(
            num_cpus=4,
            num_gpus=1,
            resources={f"node{number}": 10},
            env_vars={"GPUSCHED_SOCKET": self.daemons[number].socket},
            include_dashboard=False,
        )

    def leave(self, number: int) -> None:
        """The node says goodbye first."""
        self._cluster.remove_node(self._nodes[number], allow_graceful=True)

    def kill(self, number: int) -> None:
        """The node's raylet and everything below it, at once."""
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)

    def append(self) -> None:
        """One more node, for the daemon that is the next in ``daemons``."""
        self._nodes.append(self.add(len(self._nodes)))

    def node_id(self, number: int) -> str:
        return str(self._nodes[number].node_id)

    def replace(self, number: int) -> None:
        self._nodes[number] = self.add(number)

    def end(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()

    def model(self, name: str, number: int, **options: Any) -> Any:
        made = freezable(**options)(Model)
        handle = made.options(name=name, resources={f"node{number}": 0.1}, num_gpus=0.1).remote(
            vram_bytes=SIZE
        )
        get(handle.__ray_ready__.remote())
        return handle


def moved_over_nodes(nodes: Nodes, a: list[Any], b: list[Any]) -> None:
    """Freezes and thaws over three nodes, and one failure that takes all of it back."""
    assert len({each["node_id"] for each in get(status(a))}) == 3
    off, on = get(swap([a[0], a[1]], [b[1]]))
    assert ([each["tier"] for each in off], on[0]["from_tier"]) == (["ram", "ram"], "ram")
    assert states(*a, *b[1:]) == ["frozen", "frozen", "active", "active", "frozen"]
    with pytest.raises(errors.InsufficientGpuMemory) as refused:
        get(swap([b[1]], [a[0], a[1], b[2]]))  # b2 does not fit beside a2
    assert refused.value.cause.details["not_undone"] == []  # type: ignore[attr-defined]
    assert states(*a, *b[1:]) == ["frozen", "frozen", "active", "active", "frozen"]
    get(swap([b[1]], [a[0], a[1]]))
    assert [get(each.contents.remote()) for each in a] == [b"first bytes"] * 3


def daemon_killed_in_the_middle(nodes: Nodes, a: list[Any], b: list[Any]) -> None:
    script = Script(nodes.daemons[1].sim_dir)
    script.add("checkpoint", when="middle", delay_s=0.5)
    ref = swap(a, [b[1], b[2]])
    wait_until(lambda: script.fired("checkpoint"), within_s=20, what="the checkpoint has begun")
    nodes.daemons[1].kill9()
    nodes.daemons[1].start()
    get(ref, timeout=60)
    assert states(*a, *b[1:]) == ["frozen", "frozen", "frozen", "active", "active"]
    get(swap(b[1:], a))
    assert [get(each.contents.remote()) for each in a] == [b"first bytes"] * 3


def agents_are_pinned() -> None:
    """One for each node, detached, and where it says that it is."""
    nodes = [each["NodeID"] for each in ray.nodes()]  # type: ignore[no-untyped-call]
    listed = ray.util.list_named_actors(all_namespaces=True)
    found = [each["name"] for each in listed if each["namespace"] == agent.NAMESPACE]
    assert sorted(found) == sorted(f"agent-{node}" for node in nodes)
    where = [agent.handle(node).__ray_call__.remote(_own_node) for node in nodes]
    assert get(where) == nodes


def _own_node(_agent: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())


class LargeRank(Rank):
    def __init__(self, rank: int, directory: str) -> None:
        super().__init__(rank, directory)
        self.vram = device.init().allocate(SIZE // 8)


def ranks_of_two_nodes_meet(nodes: Nodes) -> None:
    """Their hooks wait for one another, before a freeze and after it, also when one node then refuses it."""
    directory = str(nodes.daemons[0].directory)
    ranks = [
        freezable(LargeRank).options(resources={f"node{number}": 0.1}).remote(number, directory)
        for number in range(2)
    ]
    get([each.__ray_ready__.remote() for each in ranks])
    both = ["before_freeze on MainThread", "after_thaw on MainThread"]
    get(freeze(ranks))
    get(thaw(ranks))
    assert get([each.history.remote() for each in ranks]) == [both, both]
    script = Script(nodes.daemons[1].sim_dir)
    script.add("checkpoint", error="OUT_OF_MEMORY")
    with pytest.raises(errors.GpuschedError) as refused:
        get(freeze(ranks))
    assert refused.value.cause.details["not_undone"] == []  # type: ignore[attr-defined]
    assert states(*ranks) == ["active", "active"]
    assert get([each.history.remote() for each in ranks]) == [both * 2, both * 2]
    script.clear()
    for each in ranks:
        ray.kill(each)


def frozen_for_longer_than_the_keepalive(model: Any) -> None:
    get(freeze(model))
    refs = [model.add.remote(i) for i in range(20)]
    time.sleep(KEEPALIVE_S + ANSWER_S + 2)
    get(thaw(model))
    assert get(refs) == [sum(range(i + 1)) for i in range(20)]
    assert get(model.history.remote()) == list(range(20)), "each once, and in order"


def node_killed_in_the_middle(nodes: Nodes, a: list[Any]) -> None:
    """Its models are lost; the others are as they were before, and its hosts end without anybody there to ask Ray."""
    Script(nodes.daemons[2].sim_dir).add("checkpoint", when="before", delay_s=2.0)
    ref = freeze(a)
    wait_until(lambda: states(a[0]) == ["frozen"], within_s=20, what="the first is off")
    nodes.kill(2)
    with pytest.raises((errors.Unavailable, errors.NotFound)):
        get(ref, timeout=60)
    assert states(a[0], a[1]) == ["active", "active"]
    await_no_hosts(nodes.daemons[2], within_s=GONE_S)


def node_that_joins(nodes: Nodes, a: list[Any]) -> Any:
    # Else the model may be placed on the node that is dead.
    wait_until(lambda: len(compat.living_nodes()) == 2, within_s=30, what="Ray knows of the death")
    nodes.replace(2)
    late = nodes.model("late", 2)
    assert len(get(freeze([a[0], late]))) == 2
    assert states(a[0], late) == ["frozen", "frozen"]
    get(thaw([a[0], late]))
    assert get(late.contents.remote()) == b"first bytes"
    return late


def node_that_leaves(nodes: Nodes, a: list[Any], late: Any) -> None:
    """In the middle of a freeze, as one that dies."""
    script = Script(nodes.daemons[2].sim_dir)
    script.add("checkpoint", when="before", delay_s=2.0)
    ref = freeze([a[0], late])
    wait_until(lambda: states(a[0]) == ["frozen"], within_s=20, what="the first is off")
    nodes.leave(2)
    with pytest.raises((errors.Unavailable, errors.NotFound)):
        get(ref, timeout=60)
    assert states(a[0]) == ["active"]
    await_no_hosts(nodes.daemons[2], within_s=GONE_S)
    assert get(a[0].contents.remote()) == b"first bytes"


@contextlib.contextmanager
def several_nodes(count: int) -> Iterator[Nodes]:
    daemons = [PrivateDaemon(vram="64M") for _ in range(count)]
    nodes = None
    with tempfile.TemporaryDirectory(prefix="gsr-", dir="/tmp") as directory:
        try:
            with ThreadPoolExecutor(count) as starting:
                list(starting.map(PrivateDaemon.start, daemons))
            nodes = Nodes(daemons, directory)
            yield nodes
        finally:
            if nodes is not None:
                nodes.end()
            for daemon in daemons:
                daemon.end()


def main() -> None:
    assert ENVIRONMENT.items() <= os.environ.items(), f"start it with {ENVIRONMENT}"
    begun = time.monotonic()

    def said(what: str) -> None:
        print(f"{time.monotonic() - begun:5.1f} s: {what}", flush=True)

    with several_nodes(3) as nodes:
        b = [None, *(nodes.model(f"b{number}", number, start_frozen=True) for number in (1, 2))]
        a = [nodes.model(f"a{number}", number) for number in range(3)]
        said("five models on three nodes")
        moved_over_nodes(nodes, a, b)
        said("moved over three nodes, and taken back")
        agents_are_pinned()
        ranks_of_two_nodes_meet(nodes)
        said("ranks on two nodes, whose hooks meet")
        daemon_killed_in_the_middle(nodes, a, b)
        said("a daemon killed in the middle")
        frozen_for_longer_than_the_keepalive(a[0])
        said("frozen for longer than the keepalive")
        node_killed_in_the_middle(nodes, a)
        said("a node killed in the middle")
        late = node_that_joins(nodes, a)
        said("a node that joined later")
        node_that_leaves(nodes, a, late)
        said("it left in the middle")
    said("all right")


if __name__ == "__main__":
    main()
