"""Replicas: running copies of a hosted model, each with an actor of its own.

The node's daemon forks the host; every copy is a host with the state of that moment, and a socket of its own
(``places.own_socket``). Its actor is made here, by the caller, as any other, and takes the copy over (``copies.py``);
when the actor is gone for good, so is the copy. A copy that nobody takes is ended by the node's agent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gpusched import errors
from ray_integration import actor_class, agent, control, pickling

#: What an actor's options say about how it works rather than where it is and what it is called.
_KEPT: Final = frozenset(
    {
        *("concurrency_groups", "max_concurrency", "max_pending_calls", "max_restarts"),
        *("max_task_retries", "runtime_env", "allow_out_of_order_execution"),
    }
)


def fork(
    model: Any,
    copies: int = 2,
    *,
    gpus: Sequence[int] | None = None,
    force: bool = False,
    timeout_s: float = control.TIMEOUT_S,
    **ray_options: Any,
) -> list[Any]:
    """Makes running copies of a model, its state included; returns their handles. Blocks. All copies live, or none.

    The original goes on as it was, on its GPU or frozen. Its calls under way end first, and new ones wait meanwhile.

    Args:
        model: A handle, or a name.
        copies: How many.
        gpus: The daemon's numbers of the GPUs that they go to, by turns; by default where the original is.
        force: Also where the host has files open for writing, which the copies would write to as well.
        timeout_s: Seconds for calls under way to end, and for the new actors to be there.
        ray_options: Of the new actors. By default they ask Ray for no resources, and have what the class was given:
            concurrency groups, restarts, runtime environment.

    A copy is alone in its network (no TCP to the outside), and has the original's random state. Raises what the node's
    daemon raises: Unsupported where it has no disk tier, InsufficientGpuMemory, InsufficientDisk.
    """
    ids, _ = control.resolve(model)
    if len(ids) != 1:
        raise errors.InvalidRequest(f"fork takes one model, not {len(ids)}")
    how = {"drain": True, "timeout_s": timeout_s, "force": force}
    node = agent.handle(ray.get_runtime_context().get_node_id())
    gpus = None if gpus is None else list(gpus)
    made = ray.get(node.fork_anywhere.remote(ids[0], copies, gpus, how))
    handles: list[Any] = []
    try:
        for name, own_gpus in made["copies"]:
            handles.append(_take_over(made, name, own_gpus, ray_options))
        ready = [handle.__ray_ready__.remote() for handle in handles]
        ray.get(ready, timeout=timeout_s)
    except BaseException:
        for handle in handles:
            ray.kill(handle)
        raise
    return handles


def _take_over(
    made: Mapping[str, Any], name: str, gpus: Sequence[int], options: Mapping[str, Any]
) -> Any:
    pickled_class, settings, class_options = pickling.loads(made["recipe"], [])
    settings = dataclasses.replace(settings, host=name, gpus=tuple(gpus), start_frozen=False)
    kept = {key: value for key, value in class_options.items() if key in _KEPT}
    made_class = actor_class.make_actor_class(
        pickling.loads(pickled_class, []), settings=settings, ray_options=kept
    )
    where = NodeAffinitySchedulingStrategy(node_id=made["node_id"], soft=False)
    given = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": where, **options}
    return made_class.options(**given).remote()
