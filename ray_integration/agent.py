"""The agent of a node: a detached actor, pinned there, that moves the node's models through the node's daemon.

Covers: the actor, how it is found or made, and ending hosts whose actors are dead for good (which only Ray knows).
Does not cover: how models are moved (``exchange.py``), several nodes (``cluster.py``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gpusched import errors
from gpusched.client import GpuSched
from ray_integration import compat, copies, exchange, keeper, places, tending
from ray_integration.attending import Attending
from ray_integration.cluster import Cluster, How, await_node, get
from ray_integration.metrics import NodeMetrics
from ray_integration.places import About

log = logging.getLogger(__name__)

NAMESPACE: Final = "gpusched"
#: Calls that one agent serves at a time: moves wait for calls to end, and looks must not wait for moves.
_CONCURRENCY: Final = 32
_LOOK_S: Final = 0.5
_METRICS_S: Final = 5.0
_LOCK_TIMEOUT_S: Final = 20.0


def handle(node_id: str) -> Any:
    """The agent of a node, made where there is none. Does not wait for it; a call on it fails if the node is gone."""
    return (
        ray.remote(NodeAgent)
        .options(
            name=f"agent-{node_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=_CONCURRENCY,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        )
        .remote(node_id)
    )


def _shaped(results: list[dict[str, Any]], is_one: bool) -> Any:
    return results[0] if is_one else results


class NodeAgent:
    """Runs in Ray. Its methods block; several run at a time."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._client = GpuSched()
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while (lock := places.lock(places.agent_lock(node_id))) is None:
            if time.monotonic() > deadline:
                raise errors.Unavailable(f"another agent of node {node_id} is still there")
            time.sleep(0.05)
        self._lock = lock
        self._cluster = Cluster(handle)
        self._metrics = NodeMetrics()
        self._attending = Attending(self._client, node_id)
        self._unclaimed = copies.Unclaimed()
        threading.Thread(target=self._reap, name="gpusched-reap", daemon=True).start()

    def node_id(self) -> str:
        return self._node_id

    def find(self, actor_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Those of the given models that are on this node, by actor id."""
        found = {each: About.read(each) for each in actor_ids}
        return {
            actor_id: asdict(about)
            for actor_id, about in found.items()
            if about is not None and about.node_id == self._node_id
        }

    def move(
        self,
        off: list[str],
        on: list[str],
        *,
        drain: bool,
        timeout_s: float,
        force: bool,
        keep_context: bool,
    ) -> dict[str, dict[str, Any]]:
        """Moves models of this node, by actor id, as one operation. Returns what the daemon says of each."""
        sides = [[self._about(each) for each in side] for side in (off, on)]
        op = "swap" if off and on else "freeze" if off else "thaw"
        with self._metrics.move(op):
            answer = exchange.move(
                self._client,
                *sides,
                drain=drain,
                timeout_s=timeout_s,
                force=force,
                keep_context=keep_context,
            )
        results = dict(zip([*off, *on], [*answer["off"], *answer["on"]], strict=True))
        return {actor_id: dict(result) for actor_id, result in results.items()}

    def attach(self, handles: list[Any], *, evictable: bool, timeout_s: float) -> dict[str, Any]:
        """Makes plain actors of this node freezable as they are. Returns what the daemon says of each."""
        return {
            compat.actor_id(each): self._attending.attach(
                each, evictable=evictable, timeout_s=timeout_s
            )
            for each in handles
        }

    def hibernate(self, actor_id: str, *, timeout_s: float, force: bool) -> dict[str, Any]:
        """Saves one model to disk. Its calls under way must end first: a connection cannot be saved."""
        about = self._about(actor_id)
        with (
            self._metrics.move("hibernate"),
            exchange.prepared([about], drain=True, timeout_s=timeout_s) as held,
        ):
            result = exchange.insist(lambda: self._client.hibernate(about.name, force=force))
            held.settle()
        return dict(result)

    def fork(
        self, actor_id: str, count: int, gpus: list[int] | None, *, timeout_s: float, force: bool
    ) -> dict[str, Any]:
        """Copies of one model, which wait for their actors: see ``replicas.fork``."""
        about = self._about(actor_id)
        recipe = copies.recipe_of(about)
        with (
            self._metrics.move("fork"),
            exchange.prepared([about], drain=True, timeout_s=timeout_s),
        ):
            names = self._unclaimed.fork(self._client, about.name, count, gpus, force=force)
        found = {each["name"]: each["gpus"] for each in self._client.processes()}
        copied = [(name, found[name]) for name in names]
        return {"node_id": self._node_id, "recipe": recipe, "copies": copied}

    def status(self, actor_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What the daemon says of each model's host, and its proxy of its calls."""
        processes = {found["name"]: found for found in self._client.processes()}
        answer: dict[str, dict[str, Any]] = {}
        for actor_id in actor_ids:
            about = self._about(actor_id)
            host = dict(processes.get(about.name, {"name": about.name, "state": "missing"}))
            proxy = exchange.proxy_status(about) or {"gate": "gone"}
            proxy.pop("ok", None)
            answer[actor_id] = {**host, "node_id": self._node_id, "calls": proxy}
        return answer

    # -- for a caller, over all nodes -----------------------------------------------------------

    def coordinate(
        self, off: list[str], on: list[str], are_one: tuple[bool | None, bool | None], how: Any
    ) -> Any:
        """Moves models wherever they are. The results are shaped as the caller named the models: see ``control``."""
        results = self._cluster.move(off, on, How(**how))
        sides = [
            _shaped([results[each] for each in ids], is_one)
            for ids, is_one in zip((off, on), are_one, strict=True)
            if is_one is not None
        ]
        return sides[0] if len(sides) == 1 else tuple(sides)

    def attach_all(self, handles: list[Any], is_one: bool, how: Any) -> Any:
        """Attaches actors wherever they are; the first error ends it, and those before stay attached."""
        done: dict[str, Any] = {}
        for each in handles:
            node = await_node(compat.actor_id(each), how["timeout_s"])
            ref = handle(node).attach.remote([each], **how)
            done |= get(ref, node, 2 * how["timeout_s"])
        return _shaped([done[compat.actor_id(each)] for each in handles], is_one)

    def hibernate_all(self, actor_ids: list[str], is_one: bool, how: Any) -> Any:
        results = self._cluster.hibernate(actor_ids, How(**how))
        return _shaped([results[each] for each in actor_ids], is_one)

    def fork_anywhere(self, actor_id: str, count: int, gpus: list[int] | None, how: Any) -> Any:
        return self._cluster.fork(actor_id, count, gpus, How(**how))

    def status_all(self, actor_ids: list[str], is_one: bool) -> Any:
        results = self._cluster.status(actor_ids)
        return _shaped([results[each] for each in actor_ids], is_one)

    def _about(self, actor_id: str) -> About:
        about = About.read(actor_id)
        if about is None or about.node_id != self._node_id:
            raise errors.NotFound(f"actor {actor_id} has no model on node {self._node_id}")
        if about.attached:
            self._attending.take_up(about)
        return about

    # -- hosts whose actors are dead ------------------------------------------------------------

    def _reap(self) -> None:
        due_s = 0.0
        while True:
            time.sleep(_LOOK_S)
            try:
                found = list(places.models(self._node_id))
                if found:
                    tending.ensure_keeper(self._client, self._node_id)
                for about in found:
                    if about.attached:
                        self._attending.tend(about)
                    elif not about.proxy_lives and self._is_over(about):
                        log.warning("%s", keeper.end_host(about))
                claimed = {each.name for each in found}
                self._unclaimed.end_due(self._client, claimed)
                if time.monotonic() >= due_s:
                    due_s = time.monotonic() + _METRICS_S
                    self._metrics.show(self._client.processes(), claimed)
            except errors.Unavailable:
                continue  # no daemon at the moment
            except (
                Exception
            ):  # the next look is the better try; without this thread hosts would stay
                log.exception("looking for hosts without an actor failed")

    def _is_over(self, about: About) -> bool:
        """Whether the actor will never come back to this node."""
        facts = compat.actor_facts(about.actor_id)
        if facts is None or facts["state"] == "DEAD":
            return True
        return bool(facts["state"] == "ALIVE" and facts["node_id"] != self._node_id)
