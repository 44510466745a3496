"""Ray's numbers and ours: shares of GPUs, which GPU a host really has, and what the agents tell Ray's metrics."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import ray

from daemons import PrivateDaemon, wait_until
from gpusched import errors
from ray_cluster import await_no_hosts, get
from ray_integration import freezable, freeze, on_gpu_of, place_models, status
from ray_integration.hosting import choose_gpus
from ray_models import Model

pytestmark = pytest.mark.ray
KNOWN: Any = [
    {"index": 0, "uuid": "GPU-aaaa-1111"},
    {"index": 1, "uuid": "GPU-bbbb-2222"},
]


@pytest.mark.parametrize(
    ("ray_ids", "wanted", "found"),
    [
        (["1"], None, (1,)),
        (["0", "1"], None, (0, 1)),
        (["GPU-bbbb"], None, (1,)),
        ([], None, (0,)),
        (["0"], (1,), (1,)),
    ],
)
def test_what_ray_calls_a_gpu_is_mapped_to_the_daemons_number(
    ray_ids: list[str], wanted: tuple[int, ...] | None, found: tuple[int, ...]
) -> None:
    assert choose_gpus(ray_ids, wanted, KNOWN) == found


@pytest.mark.parametrize("ray_id", ["2", "GPU-cccc", "GPU-"])
def test_a_gpu_that_the_daemon_does_not_know_is_named(ray_id: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"GPU '{ray_id}', which is none of"):
        choose_gpus([ray_id], None, KNOWN)


def free_memory() -> float:
    """In bytes, as Ray counts it."""
    found: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return found["memory"]


def test_roles_share_a_bundle_and_their_hosts_the_same_gpu(cluster: PrivateDaemon) -> None:
    roles = 2
    parked, free = 2**20, free_memory()
    group = place_models(2, roles, parked_bytes=parked)
    get(group.ready())
    taken = 2 * parked
    wait_until(
        lambda: free - free_memory() == taken, within_s=10, what="Ray counts the RAM as taken"
    )
    made = [
        freezable(Model)
        .options(**on_gpu_of(group, gpu, roles, parked_bytes=parked // roles))
        .remote()
        for gpu in range(2)
        for _ in range(roles)
    ]
    uuids = [gpu["uuid"] for gpu in cluster.client().status()["gpus"]]
    seen = [each["cuda"] for each in get([model.where.remote() for model in made])]
    assert sorted(seen) == sorted(uuids * roles), "two on each, and no GPU twice"
    assert seen[0] == seen[1] != seen[2] == seen[3]
    with pytest.raises(errors.InvalidRequest, match="at least one GPU"):
        place_models(0, 1)
    for model in made:
        ray.kill(model)
    await_no_hosts(cluster)
    ray.util.remove_placement_group(group)


def test_the_agents_metrics_are_at_rays_own_port(make: Callable[..., Any]) -> None:
    model = make("counted")
    get(freeze(model))
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    assert get(status(model))["node_id"] == node["NodeID"]

    def exported() -> bool:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        return (
            "ray_gpusched_models{" in text
            and 'outcome="done"' in text
            and "ray_gpusched_move_duration_seconds_bucket" in text
        )

    wait_until(exported, within_s=40, what=f"{url} has the agent's metrics")
