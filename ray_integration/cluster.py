"""Moving models of several nodes as one: where each is, all freezes first, then all thaws, and taking back what failed.

Runs in one agent, on the caller's behalf, so that it goes on when the caller dies. Models of one node are moved by one
operation of that node's daemon. Over several nodes nothing can be one operation: when a step fails anywhere, what the
steps before it did is undone, and the first error is raised, with what could not be undone in its details.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from gpusched import errors
from ray_integration import compat

#: Seconds that a node's daemon may take for its part, beside the time to drain: VRAM moves in seconds, not in minutes.
MOVE_TIMEOUT_S: Final = 600.0
_FIND_TIMEOUT_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.1

#: Node id -> its agent's handle, made where there is none.
AgentOf = Callable[[str], Any]
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """``drain``: calls under way end first, within ``timeout_s`` seconds. ``force``: over others' leases.

    ``keep_context``: what goes off may leave its CUDA context on the GPU.
    """

    drain: bool = True
    timeout_s: float = 60.0
    force: bool = False
    keep_context: bool = False


class Cluster:
    """All nodes as one agent sees them."""

    def __init__(self, agent_of: AgentOf) -> None:
        self._agent_of = agent_of

    # -- where models are -----------------------------------------------------------------------

    def locate(self, actor_ids: Sequence[str], timeout_s: float) -> dict[str, str]:
        """The node of each model. Waits for actors that are being made, or made again.

        Raises NotFound for an actor that is dead, or neither freezable nor attached where it is now, DeadlineExceeded
        after ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        found: dict[str, str] = {}
        lives_on: dict[str, str] = {}
        while missing := [each for each in actor_ids if each not in found]:
            more, answered = self._ask_all(missing)
            found |= more
            missing = [each for each in missing if each not in found]
            for actor_id in missing:
                node = require_coming(actor_id)
                # There before it was asked and after: a model is known before its actor is said to be alive.
                if node in answered and node == lives_on.get(actor_id):
                    raise _no_model(actor_id, node)
                lives_on[actor_id] = node
            if missing and time.monotonic() > deadline:
                raise errors.DeadlineExceeded(
                    f"no node has a model of actor {missing[0]} after {timeout_s:g} s: is there room for it, and "
                    "does a gpusched daemon run where it is?"
                )
            if missing:
                time.sleep(_LOOK_AGAIN_S)
        return found

    def _ask_all(self, actor_ids: Sequence[str]) -> tuple[dict[str, str], set[str]]:
        """Which node has which, and the nodes that answered; one that has just died has no models any more."""
        nodes = compat.living_nodes()
        asked = {node: self._agent_of(node).find.remote(actor_ids) for node in nodes}
        found: dict[str, str] = {}
        answered: set[str] = set()
        for node, ref in asked.items():
            try:
                found |= dict.fromkeys(ray.get(ref, timeout=_FIND_TIMEOUT_S), node)
                answered.add(node)
            except RayError:
                continue
        return found, answered

    # -- moves ----------------------------------------------------------------------------------

    def move(self, off: Sequence[str], on: Sequence[str], how: How) -> Results:
        """Freezes ``off`` and thaws ``on``; returns what the daemons say of each model, by actor id."""
        if clash := set(off) & set(on):
            raise errors.InvalidRequest(f"actor {sorted(clash)[0]} cannot go off and come on")
        node_of = self.locate([*off, *on], how.timeout_s)
        nodes = set(node_of.values())
        if len(nodes) == 1:
            return self._all({nodes.pop(): (list(off), list(on))}, how)
        before = self.status([*off, *on], node_of)
        active = {each for each, status in before.items() if status["state"] == "active"}
        went_off: Results = {}
        went_on: Results = {}
        try:
            self._all(_by_node(node_of, off=off), how, went_off)
            self._all(_by_node(node_of, on=on), how, went_on)
        except errors.GpuschedError as error:
            again = [each for each in went_off if each in active]
            left = self._undo(_by_node(node_of, off=[e for e in went_on if e not in active]), how)
            left += self._undo(_by_node(node_of, on=again), how)
            raise error.with_details(not_undone=left) from error
        return went_off | went_on

    def _undo(self, parts: Mapping[str, tuple[list[str], list[str]]], how: How) -> list[str]:
        try:
            self._all(parts, how)
        except errors.GpuschedError as error:
            return [str(error)]
        return []

    def _all(
        self,
        parts: Mapping[str, tuple[list[str], list[str]]],
        how: How,
        done: Results | None = None,
    ) -> Results:
        """One operation on each node, at the same time; ``done`` gets what succeeded also when another failed.

        Raises the first error once all have ended.
        """
        done = {} if done is None else done
        refs = {
            node: self._agent_of(node).move.remote(*part, **asdict(how))
            for node, part in parts.items()
        }
        failed: errors.GpuschedError | None = None
        for node, ref in refs.items():
            try:
                done |= get(ref, node, how.timeout_s + MOVE_TIMEOUT_S)
            except errors.GpuschedError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return done

    def hibernate(self, actor_ids: Sequence[str], how: How) -> Results:
        """Saves models to disk, each by itself: the first error ends it, and those before stay on disk."""
        node_of = self.locate(actor_ids, how.timeout_s)
        done: Results = {}
        for actor_id in actor_ids:
            node = node_of[actor_id]
            ref = self._agent_of(node).hibernate.remote(
                actor_id, timeout_s=how.timeout_s, force=how.force
            )
            done[actor_id] = get(ref, node, how.timeout_s + MOVE_TIMEOUT_S)
        return done

    def fork(self, actor_id: str, count: int, gpus: Sequence[int] | None, how: How) -> Any:
        """Copies of a model, on its node; what they are, for who makes their actors."""
        node = self.locate([actor_id], how.timeout_s)[actor_id]
        ref = self._agent_of(node).fork.remote(
            actor_id, count, gpus, timeout_s=how.timeout_s, force=how.force
        )
        return get(ref, node, how.timeout_s + MOVE_TIMEOUT_S)

    def status(self, actor_ids: Sequence[str], node_of: Mapping[str, str] | None = None) -> Results:
        node_of = node_of or self.locate(actor_ids, _FIND_TIMEOUT_S)
        found: Results = {}
        refs = {
            node: self._agent_of(node).status.remote([a for a in actor_ids if node_of[a] == node])
            for node in set(node_of.values())
        }
        for node, ref in refs.items():
            found |= get(ref, node, _FIND_TIMEOUT_S)
        return found


def get(ref: Any, node: str, timeout_s: float) -> Any:
    """The answer of a node's agent. Raises its own error, or Unavailable for an agent or node that is gone."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, errors.GpuschedError):
            raise cause from error
        raise errors.InternalError(f"the agent of node {node} failed: {error}") from error
    except ray.exceptions.GetTimeoutError as error:
        raise errors.DeadlineExceeded(
            f"node {node} did not answer within {timeout_s:g} s"
        ) from error
    except RayError as error:
        raise errors.Unavailable(
            f"node {node} does not answer: it, or its agent, is gone ({type(error).__name__})",
            {"node": node},
        ) from error


def await_node(actor_id: str, timeout_s: float) -> str:
    """The node of an actor, once it is there. Raises NotFound for a dead one, DeadlineExceeded."""
    deadline = time.monotonic() + timeout_s
    while True:
        if node := require_coming(actor_id):
            return node
        if time.monotonic() > deadline:
            raise errors.DeadlineExceeded(
                f"actor {actor_id} is not there after {timeout_s:g} s: is there room for it?"
            )
        time.sleep(_LOOK_AGAIN_S)


def require_coming(actor_id: str) -> str:
    """The node of an actor that is alive, "" while it is made. Raises NotFound for one that is dead for good."""
    facts = compat.actor_facts(actor_id)
    if facts is None or facts["state"] == "DEAD":
        raise errors.NotFound(f"actor {actor_id} is dead", {"actor_id": actor_id})
    return str(facts["node_id"]) if facts["state"] == "ALIVE" else ""


def _no_model(actor_id: str, node: str) -> errors.NotFound:
    return errors.NotFound(
        f"actor {actor_id} on node {node} is a plain actor: make its class freezable, or attach() it first, and again "
        "once it was restarted on another node",
        {"actor_id": actor_id, "node": node},
    )


def _by_node(
    node_of: Mapping[str, str], *, off: Iterable[str] = (), on: Iterable[str] = ()
) -> dict[str, tuple[list[str], list[str]]]:
    parts: dict[str, tuple[list[str], list[str]]] = {}
    for actor_id in off:
        parts.setdefault(node_of[actor_id], ([], []))[0].append(actor_id)
    for actor_id in on:
        parts.setdefault(node_of[actor_id], ([], []))[1].append(actor_id)
    return parts
