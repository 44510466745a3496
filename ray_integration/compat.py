"""Everything that is not Ray's public interface, in one place. What was tested: see ``ray`` in pyproject.toml.

Each function says what it stands in for, so that a new version of Ray has one file to be compared with.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import ray


def actor_id(handle: Any) -> str:
    """A handle's actor id in hex. (There is no public way: ``ActorHandle._actor_id``.)"""
    return str(handle._actor_id.hex())


def is_handle(value: Any) -> bool:
    return isinstance(value, ray.actor.ActorHandle)


def is_actor_class(value: Any) -> bool:
    return isinstance(value, ray.actor.ActorClass)


def actor_facts(actor_id: str) -> dict[str, Any] | None:
    """What the GCS knows of an actor: ``state``, ``node_id``, ``pid``; None when it does not know it. Quick.

    (``ray.util.state.get_actor`` says the same, but needs the dashboard and takes ten times as long.)
    """
    from ray._private import state

    found = state.actors(actor_id)
    if not found:
        return None
    address = found.get("Address") or {}
    return {
        "state": str(found.get("State", "")),
        "node_id": str(address.get("NodeID", "")),
        "pid": int(found.get("Pid") or 0),
    }


def own_actor_methods(cls: type, *, is_async: bool, call: Any) -> None:
    """Gives an actor class the methods that Ray adds to each, with ``__ray_call__`` of our own.

    Ray leaves a class alone that has ``__ray_actor_class__`` (``ray.actor._modify_class``).
    """

    def ready(self: Any) -> bool:
        return True

    def terminate(self: Any) -> None:
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    async def ready_async(self: Any) -> bool:
        return True

    async def terminate_async(self: Any) -> None:
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    # Not ``cls`` itself: Ray disassembles the classes that it finds in a class.
    cls.__ray_actor_class__ = type(cls.__name__, (), {"__module__": cls.__module__})  # type: ignore[attr-defined]
    cls.__ray_ready__ = ready_async if is_async else ready  # type: ignore[attr-defined]
    cls.__ray_terminate__ = terminate_async if is_async else terminate  # type: ignore[attr-defined]
    cls.__ray_call__ = call  # type: ignore[attr-defined]


def weak_handle(handle: Any) -> tuple[Any, bytes]:
    """A handle that does not keep its actor alive, and what makes another of it, also in another process.

    (``ray.get_actor`` gives such handles, for named actors alone.)
    """
    state = handle._serialization_helper()[0]
    return weak_handle_of(state), state


def weak_handle_of(state: bytes) -> Any:
    return ray.actor.ActorHandle._deserialization_helper(state, True, None)


def own_actor_facts() -> dict[str, Any]:
    """Of the actor in whose worker this is called: how many calls it makes at a time, its name, its GPUs."""
    context = ray.get_runtime_context()
    worker: Any = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    is_async = bool(worker.current_actor_is_asyncio())
    return {
        "is_async": is_async,
        # One thread lets the calls of an event loop in.
        "slots": 1 if is_async else int(worker.current_actor_max_concurrency()),
        "name": str(context.get_actor_name() or ""),
        "gpus": [str(each) for each in context.get_accelerator_ids().get("GPU", [])],
    }


def calls_on_event_loop() -> int:
    """How many calls of the actor in whose worker this is are on its event loop; 0 where it has none."""
    worker: Any = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    if not worker.current_actor_is_asyncio():
        return 0
    from ray._raylet import PythonFunctionDescriptor  # type: ignore[attr-defined]

    any_method = PythonFunctionDescriptor("", "__init__", "", "")
    loop, _ = worker.get_event_loop(any_method, "")
    return sum(
        "run_async_func_or_coro" in getattr(task.get_coro(), "__qualname__", "")
        for task in asyncio.all_tasks(loop)
    )


def method_options(method: Any) -> dict[str, Any]:
    """What ``@ray.method`` left on a method, to be put on another that stands for it."""
    return {name: value for name, value in vars(method).items() if name.startswith("__ray_")}


def bare_signature(method: Any) -> inspect.Signature:
    """A method's parameters without annotations, with plain defaults: Ray sends them with every handle."""
    plain = (bool, int, float, str, bytes, type(None))
    parameters = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=parameter.default
            if parameter.default is inspect.Parameter.empty or isinstance(parameter.default, plain)
            else ...,
        )
        for parameter in inspect.signature(method).parameters.values()
    ]
    return inspect.Signature(parameters)


def is_cancelled() -> bool:
    """Whether ``ray.cancel`` was called on the call that this thread is in. False in an actor with async methods."""
    try:
        return bool(ray.get_runtime_context().is_canceled())
    except RuntimeError:
        return False


def living_nodes() -> list[str]:
    """The ids of the cluster's nodes. (``ray.nodes`` is public, but has no types.)"""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [str(node["NodeID"]) for node in nodes if node["Alive"]]
