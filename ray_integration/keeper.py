"""Ends the hosts that nobody is left to end: those of a node whose agent is gone with its cluster.

Started through the daemon by the first proxy of a node, so that it outlives whatever Ray ends. While the node's agent
lives, that one decides: it can ask Ray whether an actor will come back. The keeper acts only for proxies that died
when no agent was there, or none came back. It ends when no model of its node is left.

A frozen host cannot notice anything by itself, which is why there is this process. Standard library and SDK only.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final

from gpusched import errors
from gpusched.client import GpuSched
from ray_integration import places
from ray_integration.places import About

#: Seconds that proxy and agent must both be gone: a restarting agent or proxy is back by then, or its node is not.
GRACE_S: Final = 4.0
_LOOK_S: Final = 0.5
#: Seconds without any model after which it ends; and without an agent too, which will not make any.
_LINGER_S: Final = 30.0
_LINGER_ALONE_S: Final = 2.0
_DAEMON_TIMEOUT_S: Final = 5.0


def main(node_id: str) -> None:
    """Looks until there is nothing left to keep. One for each node: a second one ends at once."""
    lock = places.lock(places.keeper_lock(node_id))
    if lock is None:
        return
    say(f"keeping the hosts of node {node_id}")
    alone_since: dict[str, float] = {}
    last_needed = time.monotonic()
    agent_lives = True
    while time.monotonic() - last_needed < (_LINGER_S if agent_lives else _LINGER_ALONE_S):
        agent_lives = places.is_locked(places.agent_lock(node_id))
        for about in places.models(node_id):
            last_needed = time.monotonic()
            if agent_lives or about.proxy_lives:
                alone_since.pop(about.actor_id, None)
                continue
            since = alone_since.setdefault(about.actor_id, time.monotonic())
            if time.monotonic() - since > GRACE_S:
                say(end_host(about))
        time.sleep(_LOOK_S)
    say("nothing is left to keep")
    places.keeper_lock(node_id).unlink(missing_ok=True)
    if not agent_lives:
        places.agent_lock(node_id).unlink(missing_ok=True)
    with contextlib.suppress(errors.GpuschedError), GpuSched(timeout_s=_DAEMON_TIMEOUT_S) as client:
        client.kill(
            places.keeper_name(node_id), force=True
        )  # ourselves: else the name stays in status


def end_host(about: About) -> str:
    """Kills a model's host and forgets the model; says what came of it. To be tried again while the daemon is away."""
    with GpuSched(about.socket, timeout_s=_DAEMON_TIMEOUT_S) as client:
        try:
            if about.attached and _has_a_raylet(client, about.name):
                return f"{about.name} is a worker of Ray's, which ends it"
            with contextlib.suppress(errors.NotFound):
                client.kill(about.name, force=True)
        except errors.GpuschedError as error:
            return f"{about.name} cannot be ended yet: {error}"
    about.remove()
    return f"{about.name}: its actor is gone, and so is its host now"


def _has_a_raylet(client: GpuSched, name: str) -> bool:
    """Whether the worker of an attached actor lives, as a child of the raylet that started it."""
    for found in client.processes():
        if found["name"] == name and found["state"] != "dead":
            with contextlib.suppress(OSError, ValueError):
                stat = Path(f"/proc/{found['pid']}/stat").read_text()
                parent = stat.rpartition(")")[2].split()[1]
                return Path(f"/proc/{parent}/comm").read_text().startswith("raylet")
    return False


def say(text: str) -> None:
    """Into the log."""
    print(text, flush=True)  # noqa: T201
