"""Copies of a host on their way to become replicas: what their actors are made of, and who has taken which.

Covers: what a model's proxy leaves for it, how the proxy of a replica takes its copy over, and the copies that an agent
still waits for. Does not cover: making them (``replicas.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gpusched import errors, types
from gpusched.client import GpuSched
from ray_integration import hooks, hosting
from ray_integration.errors import HostLost
from ray_integration.places import About

if TYPE_CHECKING:
    from ray_integration.proxy import Settings

log = logging.getLogger(__name__)

#: In a model's directory: its class, settings and options, of which the actors of its copies are made.
RECIPE: Final = "recipe"


def write_recipe(
    directory: Path, pickled_class: bytes, settings: Settings, ray_options: Mapping[str, Any]
) -> None:
    """Whole or not at all."""
    from ray import cloudpickle

    part = directory / f"{RECIPE}.part"
    content = cloudpickle.dumps((pickled_class, settings, dict(ray_options)))  # type: ignore[no-untyped-call]
    part.write_bytes(content)
    part.chmod(0o600)
    part.rename(directory / RECIPE)


def claim(found: types.ProcessStatus | None, about: About) -> None:
    """Takes over the copy that ``about`` names; again where its actor was restarted. Raises HostLost."""
    if found is None or found["state"] in {"dead", "failed"}:
        raise HostLost(f"{about.name}, a copy of a model, has ended; its actor cannot make another")
    about.write()
    ready = about.directory / hosting.READY
    if not ready.exists():
        # The original was made ready for a freeze before it was copied; the copy still is.
        (about.directory / hooks.MARK).touch(mode=0o600)
        ready.touch(mode=0o600)


class Unclaimed:
    """Copies of a node's models that have no actor yet. Threads may share it."""

    #: Seconds that one may be without. Ray starts a worker in seconds, on a busy machine in many.
    timeout_s = 180.0

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def fork(
        self, client: GpuSched, name: str, count: int, gpus: Sequence[int] | None, *, force: bool
    ) -> list[str]:
        """Makes copies; their names. Asked once: twice would make twice as many. Raises what the daemon raises."""
        taken = {each["name"] for each in client.processes()}
        free = (n for i in itertools.count(1) if (n := f"{name}-{i}") not in taken)
        expected = list(itertools.islice(free, count))
        self._add(expected)  # before: a daemon that dies in the middle may have made them
        try:
            names = list(client.fork(name, count, gpus, force=force)["copies"])
        except errors.Unavailable:
            raise
        except errors.GpuschedError:
            self._forget(expected)
            raise
        self._add(names)
        return names

    def end_due(self, client: GpuSched, claimed: Iterable[str]) -> None:
        """Ends those that nobody has taken in time. Raises what the daemon raises; to be called again then."""
        self._forget(claimed)
        now = time.monotonic()
        for name in [name for name, until in self._until.items() if now >= until]:
            with contextlib.suppress(errors.NotFound):
                client.kill(name, force=True)
                log.warning("%s, a copy, has got no actor and was ended", name)
            self._forget([name])

    def _add(self, names: Iterable[str]) -> None:
        self._until.update(dict.fromkeys(names, time.monotonic() + self.timeout_s))

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._until.pop(name, None)


def recipe_of(about: About) -> bytes:
    """Raises NotFound for a model that is only being made."""
    with contextlib.suppress(FileNotFoundError):
        return (about.directory / RECIPE).read_bytes()
    raise errors.NotFound(f"{about.name} is not made yet")
