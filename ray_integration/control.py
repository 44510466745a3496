"""What a driver says to its models: ``freeze``, ``thaw``, ``swap``, ``hibernate``, ``status``, ``attach``.

Each takes handles (one, a list, a group's name, a named actor's name) and returns an ObjectRef at once, as calls in Ray
do: ``ray.get(swap(policy, reward))``, or ``await swap(policy, reward)``. The result is a dict for one model and
a list of dicts for several. Errors are those of ``gpusched.errors``, catchable by their class; ``error.cause`` is the
original with its details.

The work is done by an agent of the cluster, so it is finished, or taken back, even if the caller dies meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final, TypeAlias

import ray

from gpusched import errors
from ray_integration import agent, compat, groups
from ray_integration.cluster import How

#: A handle, a reference to one, a name, a group, or several of these.
Models: TypeAlias = Any

TIMEOUT_S: Final = 60.0


def freeze(
    models: Models,
    *,
    drain: bool = True,
    timeout_s: float = TIMEOUT_S,
    force: bool = False,
    keep_context: bool = False,
) -> ray.ObjectRef[Any]:
    """Takes models off their GPUs into host RAM: all of them, or none.

    Args:
        models: Whom; frozen ones are a success without action.
        drain: Wait until calls under way have ended. Else they stand still in their middle and go on after the thaw.
        timeout_s: Seconds for that, and for actors that are just being made; then DrainTimeout, and nothing is changed.
        force: Over leases of others.
        keep_context: Their CUDA contexts may stay on the GPUs until somebody needs the room: faster both ways.

    A DrainTimeout, LeaseHeld, InsufficientHostMemory, NotFound (the actor is dead) comes out of ``ray.get``.
    """
    ids, is_one = resolve(models)
    how = How(drain=drain, timeout_s=timeout_s, force=force, keep_context=keep_context)
    return _coordinate(ids, [], (is_one, None), how)


def thaw(models: Models, *, timeout_s: float = TIMEOUT_S) -> ray.ObjectRef[Any]:
    """Brings models back onto their GPUs, from host RAM or from disk: all, or none (InsufficientGpuMemory)."""
    ids, is_one = resolve(models)
    return _coordinate([], ids, (None, is_one), How(timeout_s=timeout_s))


def swap(
    off: Models,
    on: Models,
    *,
    drain: bool = True,
    timeout_s: float = TIMEOUT_S,
    force: bool = False,
    keep_context: bool = True,
) -> ray.ObjectRef[Any]:
    """Freezes ``off`` and thaws ``on``: one operation of the node's daemon, rolled back whole. Gives both results.

    Models on several nodes: all freezes first, then all thaws; an error anywhere takes back what was done before it.
    The CUDA contexts of ``off`` stay on the GPUs for as long as there is room for them (each result's ``context_mb``),
    for they are about to come back; ``keep_context=False`` leaves nothing.
    """
    off_ids, off_is_one = resolve(off)
    on_ids, on_is_one = resolve(on)
    how = How(drain=drain, timeout_s=timeout_s, force=force, keep_context=keep_context)
    return _coordinate(off_ids, on_ids, (off_is_one, on_is_one), how)


def move(off: list[str], on: list[str], *, drain: bool, timeout_s: float) -> ray.ObjectRef[Any]:
    """``swap`` by actor ids, either side of which may be empty; gives two lists."""
    how = How(drain=drain, timeout_s=timeout_s, keep_context=True)
    return _coordinate(off, on, (False, False), how)


def hibernate(
    models: Models, *, timeout_s: float = TIMEOUT_S, force: bool = False
) -> ray.ObjectRef[Any]:
    """Saves models to disk, which frees their host RAM too; ``thaw`` brings them back. Drains first, always.

    Several are saved one after the other. Unsupported where the node has no disk tier.
    """
    ids, is_one = resolve(models)
    options = {"timeout_s": timeout_s, "force": force}
    ref: ray.ObjectRef[Any] = _some_agent().hibernate_all.remote(ids, is_one, options)
    return ref


def status(models: Models) -> ray.ObjectRef[Any]:
    """What the daemon says of each model's host (state, tier, mem_mb, pid, gpus, ...), its node, and its calls.

    ``calls``: the gate (open, moving, frozen, or gone while the actor is being restarted), how many calls are under
    way and wait, and for how long it has been idle.
    """
    ids, is_one = resolve(models)
    ref: ray.ObjectRef[Any] = _some_agent().status_all.remote(ids, is_one)
    return ref


def attach(
    actors: Models, *, evictable: bool = False, timeout_s: float = TIMEOUT_S
) -> ray.ObjectRef[Any]:
    """Makes existing actors, of any class, freezable as they are: their own workers are frozen, and never stopped.

    For actors that are not yours to change. VRAM goes to host RAM, never to disk. Calls on a frozen one begin, and wait
    in their first use of CUDA. Gives what ``status`` says. See docs/ray.md for what is different from ``freezable``.

    Args:
        actors: Whom; those that are attached already are a success without action.
        evictable: Other users of the daemon may have them frozen to make room.
        timeout_s: Seconds for each to exist and to answer.

    Raises out of ``ray.get``: Unsupported for a class with concurrency groups, InvalidRequest for a freezable actor.
    """
    handles, is_one = resolve_handles(actors)
    options = {"evictable": evictable, "timeout_s": timeout_s}
    ref: ray.ObjectRef[Any] = _some_agent().attach_all.remote(handles, is_one, options)
    return ref


def resolve(models: Models) -> tuple[list[str], bool]:
    """The actor ids, each once, and whether it was one model rather than several. Raises InvalidRequest."""
    handles, is_one = resolve_handles(models)
    return [compat.actor_id(each) for each in handles], is_one


def resolve_handles(models: Models) -> tuple[list[Any], bool]:
    """The handles, each actor once, and whether it was one. Raises InvalidRequest."""
    if isinstance(models, ray.ObjectRef):
        models = ray.get(models)
    if isinstance(models, str):
        models = groups.by_name(models) or ray.get_actor(models)
    if compat.is_handle(models):
        return [models], True
    if isinstance(models, groups.Group):
        models = models.handles
    if not isinstance(models, Iterable):
        raise errors.InvalidRequest(
            f"{models!r} is neither a handle of a model, nor several, nor a name"
        )
    handles = [handle for each in models for handle in resolve_handles(each)[0]]
    return list({compat.actor_id(each): each for each in handles}.values()), False


def _coordinate(
    off: list[str],
    on: list[str],
    are_one: tuple[bool | None, bool | None],
    how: How,
) -> ray.ObjectRef[Any]:
    ref: ray.ObjectRef[Any] = _some_agent().coordinate.remote(off, on, are_one, asdict(how))
    return ref


def _some_agent() -> Any:
    """The agent that does it for us: our own node's."""
    return agent.handle(ray.get_runtime_context().get_node_id())
