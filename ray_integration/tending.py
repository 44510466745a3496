"""What a node needs for its models: the agent that moves them, and the keeper for when that is gone."""

from __future__ import annotations

import contextlib

from gpusched import errors
from gpusched.client import GpuSched
from ray_integration import agent, hosting, places
from ray_integration.places import About


def ensure(client: GpuSched, about: About) -> None:
    """Starts what is not there yet; does not wait for it. Raises what the daemon's ``run`` raises."""
    if not places.is_locked(places.keeper_lock(about.node_id)):
        start = places.base() / f"node-{about.node_id}.json"
        with contextlib.suppress(errors.AlreadyExists):  # another proxy is doing the same
            client.run(
                places.process_name("ray-keeper", about.node_id),
                hosting.command(start, "keeper", about.node_id),
                isolate=False,  # it is to see the host's processes, and never to be saved to disk
            )
    agent.handle(about.node_id)
