"""GPUs as Ray counts them: one placement-group bundle for each physical GPU, of which every role takes a share.

Ray's numbers only place the actors; that two models do not hold a GPU at the same time is the daemon's doing. A role's
share is ``1 / roles`` of a GPU, so that all roles of a loop can be placed on the same one. The RAM that frozen models
take is told to Ray as ``memory``, so that it does not place so much beside them that its memory monitor must kill.
"""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gpusched import errors


def place_models(
    gpus: int,
    roles: int,
    *,
    parked_bytes: int = 0,
    strategy: str = "STRICT_PACK",
    name: str = "",
    **options: Any,
) -> PlacementGroup:
    """A placement group for ``roles`` models on each of ``gpus`` GPUs. Does not wait: ``ray.get(group.ready())``.

    Args:
        gpus: Physical GPUs; a model of n ranks takes n bundles.
        roles: Models that take turns on each of them. A CPU is reserved for each.
        parked_bytes: Host RAM for each GPU's frozen models, taken off what Ray thinks is free.
        strategy: Ray's; by default all bundles are on one node.
        name: Of the group, in Ray's own listings.
        options: More of ``ray.util.placement_group``.
    """
    if gpus < 1 or roles < 1:
        raise errors.InvalidRequest(f"at least one GPU and one role, not {gpus} and {roles}")
    bundle: dict[str, float] = {"GPU": 1, "CPU": roles}
    if parked_bytes:
        bundle["memory"] = parked_bytes
    bundles = [dict(bundle) for _ in range(gpus)]
    group: PlacementGroup = placement_group(bundles, strategy, name, **options)
    return group


def on_gpu_of(
    group: PlacementGroup, gpu: int, roles: int, *, parked_bytes: int = 0
) -> dict[str, Any]:
    """Options for an actor class: one role's share of the bundle number ``gpu``.

    ``freezable(Policy).options(**on_gpu_of(group, 0, roles=3)).remote()``. ``parked_bytes``: of this model, out of the
    bundle's.
    """
    options: dict[str, Any] = {
        "num_gpus": 1 / roles,
        "num_cpus": 1,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=gpu
        ),
    }
    return options | ({"memory": parked_bytes} if parked_bytes else {})
