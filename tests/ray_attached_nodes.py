"""Plain actors on several nodes with a daemon each, attached where they are, and moved as one list.

A program of its own, as ``ray_three_nodes.py`` is: two nodes, and with ``--all`` a third that is killed in the middle
of a freeze. Ends with 0 and "all right", or with the first assertion that did not hold. Run by ``test_ray_nodes.py``.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from daemons import PrivateDaemon, wait_until
from gpusched import errors
from gpusched.daemon import sim_directory
from gpusched.mechanisms.sim.script import Script
from ray_cluster import await_no_hosts, get, states
from ray_integration import DrainTimeout, attach, freeze, group, on_gpu, status, swap, thaw
from ray_models import Model
from ray_three_nodes import GONE_S, SIZE, Nodes, several_nodes

#: Fits beside one of ``SIZE``.
SMALL = SIZE // 4
#: Seconds in which an error must be there that no waiting can turn into anything else.
AT_ONCE_S = 5.0


class Worker(Model):
    """As a trainer's worker is: it knows nothing of us. Its VRAM is on the node where it is made."""

    def __init__(self, size: int) -> None:
        state_dir = Path(os.environ["GPUSCHED_SOCKET"]).parent / "state"
        os.environ["GPUSCHED_SIM_DIR"] = str(sim_directory(state_dir))
        super().__init__(vram_bytes=size)

    def pid(self) -> int:
        return os.getpid()


def plain(number: int, size: int = SIZE, **options: Any) -> Any:
    """A plain actor on the node; does not wait for it."""
    options.setdefault("resources", {f"node{number}": 0.1})
    return ray.remote(num_cpus=0)(Worker).options(**options).remote(size)


def moves(daemon: PrivateDaemon) -> tuple[int, int]:
    """Freezes and thaws that this daemon has done."""
    metrics = daemon.client().status()["metrics"]
    return metrics["freezes"], metrics["thaws"]


def contents(*workers: Any) -> list[bytes]:
    found: list[bytes] = get([each.contents.remote() for each in workers])
    return found


def used_mb(nodes: Nodes) -> list[int]:
    return [each.client().status()["gpus"][0]["mem_used_mb"] for each in nodes.daemons]


def attached_and_moved_as_one(nodes: Nodes, a: list[Any]) -> None:
    """The daemon of each one's own node has it; all are off, and no worker is stopped."""
    found = get(attach(a))
    assert [each["pid"] for each in found] == get([each.pid.remote() for each in a])
    assert [(each["state"], each["stop"]) for each in found] == [("active", False)] * len(a)
    assert len({each["node_id"] for each in found}) == len(a)
    for each, daemon in zip(found, nodes.daemons, strict=True):
        assert each["name"] in [process["name"] for process in daemon.client().processes()]
    assert [each["tier"] for each in get(freeze(a))] == ["ram"] * len(a)
    assert used_mb(nodes) == [0] * len(a)
    assert get([each.add.remote(1) for each in a]) == [1] * len(a), "no VRAM needed: answered"
    waiting = [each.contents.remote() for each in a]
    assert ray.wait(waiting, num_returns=1, timeout=0.3)[0] == []
    get(thaw(a))
    assert get(waiting) == [b"first bytes"] * len(a)


def swapped_over_nodes(a: list[Any], other: Any) -> None:
    """``other`` is on the second node, off, and does not fit beside a[1]."""
    off, on = get(swap(a, [other]))
    assert ([each["tier"] for each in off], on[0]["from_tier"]) == (["ram", "ram"], "ram")
    assert states(*a, other) == ["frozen", "frozen", "active"]
    assert contents(other) == [b"first bytes"]
    get(swap(other, a))
    assert states(*a, other) == ["active", "active", "frozen"]
    assert contents(*a) == [b"first bytes"] * 2


def one_nodes_refusal_takes_the_others_back(nodes: Nodes, a: list[Any], other: Any) -> None:
    """By what its worker holds, and by the thaw that comes after the freezes: each time the first node's worker has
    been off and is on again.
    """
    before = [moves(each) for each in nodes.daemons]
    script = Script(nodes.daemons[1].sim_dir)
    script.add("obstacles", obstacle={"kind": "nccl", "message": "it holds NCCL P2P memory"})
    with pytest.raises(errors.Unsupported, match="NCCL P2P") as refused:
        get(freeze(a))
    script.clear()
    _all_back(a, other, refused.value)

    with pytest.raises(errors.InsufficientGpuMemory) as full:
        get(swap(a[0], other))
    _all_back(a, other, full.value)
    assert contents(*a) == [b"first bytes"] * 2
    (off, on), second = before
    assert [moves(each) for each in nodes.daemons] == [(off + 2, on + 2), second]


def _all_back(a: list[Any], other: Any, error: Any) -> None:
    assert error.cause.details["not_undone"] == []
    assert states(*a, other) == ["active", "active", "frozen"]


def a_call_under_way_takes_the_others_back(a: list[Any]) -> None:
    busy = a[1].slow_add.remote(1, 1.2)
    with pytest.raises(DrainTimeout) as late:
        get(freeze(a, timeout_s=0.3))
    assert late.value.cause.details["not_undone"] == []
    assert states(*a) == ["active", "active"]
    get(busy)
    assert contents(*a) == [b"first bytes"] * 2


def an_agent_elsewhere_keeps_nobody_alive(daemon: PrivateDaemon, models: list[Any]) -> None:
    """The handle went to the driver's node first, and from there to the worker's."""
    name = get(status(models[0]))["name"]
    del models[0]
    gc.collect()  # the errors that were caught refer to frames that refer to it
    await_no_hosts(daemon, name, within_s=20)


def leased_on_all_nodes(a: list[Any]) -> None:
    get(freeze(a[0]))
    with on_gpu(*a):
        assert states(*a) == ["active", "active"]
        with pytest.raises(errors.LeaseHeld) as held:
            get(freeze(a))
        assert held.value.cause.details["not_undone"] == []  # type: ignore[attr-defined]
    get(freeze(a))
    get(thaw(a))


def node_killed_in_the_middle(nodes: Nodes, ranks: Any) -> None:
    """The others are on their GPUs again, and of the node's own worker nothing is left at its daemon."""
    first, second, _ = ranks.handles
    Script(nodes.daemons[2].sim_dir).add("checkpoint", when="before", delay_s=2.0)
    ref = freeze(ranks)
    wait_until(lambda: states(first, second) == ["frozen"] * 2, within_s=20, what="two are off")
    nodes.kill(2)
    with pytest.raises(errors.Unavailable) as gone:
        get(ref, timeout=60)
    assert gone.value.cause.details["not_undone"] == []  # type: ignore[attr-defined]
    assert states(first, second) == ["active", "active"]
    assert contents(first, second) == [b"first bytes"] * 2
    await_no_hosts(nodes.daemons[2], within_s=GONE_S)


def restarted_on_another_node(first: Any, moved: Any, lost: str) -> None:
    """It has a new worker elsewhere, which nobody has attached: that is said at once, and nothing moves."""
    wait_until(lambda: _answers(moved), within_s=30, what="the actor is restarted elsewhere")
    begun = time.monotonic()
    for ref in (freeze([first, moved]), status(moved)):
        with pytest.raises(errors.NotFound, match=r"attach\(\) it first, and again"):
            get(ref)
    assert time.monotonic() - begun < AT_ONCE_S
    assert states(first) == ["active"]
    found = get(attach(moved))
    assert found["node_id"] != lost
    assert found["pid"] == get(moved.pid.remote())
    get(freeze([first, moved]))
    assert states(first, moved) == ["frozen", "frozen"]
    get(thaw([first, moved]))
    assert contents(first, moved) == [b"first bytes"] * 2


def _answers(actor: Any) -> bool:
    try:
        return bool(get(actor.pid.remote()))
    except ray.exceptions.ActorUnavailableError:
        return False


def third_node(nodes: Nodes, a: list[Any]) -> None:
    # Only the third node has a GPU for a worker that may be anywhere; later the others have one too.
    elsewhere = ray.util.placement_group([{"GPU": 1}] * 2)
    get(elsewhere.ready())
    nodes.daemons.append(PrivateDaemon(vram="64M"))
    nodes.daemons[2].start()
    nodes.append()
    node_id = nodes.node_id(2)
    third = plain(2, SMALL, resources={}, num_gpus=0.5, max_restarts=1)
    get(third.pid.remote())
    ray.util.remove_placement_group(elsewhere)
    ranks = group("ranks", [*a, third])
    assert [each["node_id"] for each in get(attach(ranks))][2] == node_id
    assert len(get(freeze("ranks"))) == 3
    assert states(*ranks.handles) == ["frozen"] * 3
    get(thaw("ranks"))
    said("a third node has joined")
    node_killed_in_the_middle(nodes, ranks)
    said("it was killed in the middle of a freeze")
    restarted_on_another_node(a[0], third, node_id)
    said("its worker is attached again elsewhere")


BEGUN = time.monotonic()


def said(what: str) -> None:
    print(f"{time.monotonic() - BEGUN:5.1f} s: {what}", flush=True)


def main(*, everything: bool) -> None:
    with several_nodes(2) as nodes:
        a = [plain(0), plain(1)]
        attached_and_moved_as_one(nodes, a)
        said("attached on two nodes")
        get(freeze(a[1]))
        other = plain(1)
        get(attach(other))
        get(swap(other, a[1]))
        swapped_over_nodes(a, other)
        said("swapped over two nodes")
        one_nodes_refusal_takes_the_others_back(nodes, a, other)
        said("refused and taken back")
        passed_on = [other]
        del other
        an_agent_elsewhere_keeps_nobody_alive(nodes.daemons[1], passed_on)
        said("forgotten with its last handle")
        if everything:
            a_call_under_way_takes_the_others_back(a)
            leased_on_all_nodes(a)
            said("held by a call, and by a lease")
            third_node(nodes, a)
    said("all right")


if __name__ == "__main__":
    main(everything="--all" in sys.argv[1:])
