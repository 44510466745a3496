"""Starting a node's keeper: by the first proxy, and by the agent where it has ended for want of models."""

from __future__ import annotations

import contextlib

from gpusched import errors
from gpusched.client import GpuSched
from ray_integration import hosting, places


def ensure_keeper(client: GpuSched, node_id: str) -> None:
    """Starts it if it is not there; does not wait for it. Raises what the daemon's ``run`` raises."""
    if places.is_locked(places.keeper_lock(node_id)):
        return
    start = places.base() / f"node-{node_id}.json"
    with contextlib.suppress(errors.AlreadyExists):  # somebody else is doing the same
        client.run(
            places.keeper_name(node_id),
            hosting.command(start, "keeper", node_id),
            isolate=False,  # it is to see the host's processes, and never to be saved to disk
        )
