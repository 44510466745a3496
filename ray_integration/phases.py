"""Keeping models on their GPUs for a stretch of a driver's program: ``on_gpu`` and ``Phases``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gpusched import errors
from gpusched.client import GpuSched, Lease
from ray_integration import agent, cluster, compat, control, exchange
from ray_integration.control import Models
from ray_integration.places import About

_HOLD_TIMEOUT_S: Final = 120.0
_RELEASE_TIMEOUT_S: Final = 30.0
#: How often somebody else may take the room between making it and leasing it.
_ATTEMPTS: Final = 5


class LeaseHolder:
    """An actor on the models' node that holds leases for one driver, and loses them when it dies with that driver."""

    def __init__(self) -> None:
        self._client = GpuSched()
        self._leases: dict[str, Lease] = {}

    def hold(self, token: str, actor_ids: list[str], *, evict: bool) -> None:
        """Brings the models on and leases them: all, or none is leased. Raises InsufficientGpuMemory."""
        models = []
        for actor_id in actor_ids:
            if (about := About.read(actor_id)) is None:
                raise errors.NotFound(f"actor {actor_id} has no model on this node")
            models.append(about)
        for attempt in range(_ATTEMPTS):
            exchange.bring_on(self._client, models, evict=evict)
            lease = self._client.on_gpu(*(about.name for about in models))
            try:
                self._leases[token] = lease.__enter__()
            except errors.InsufficientGpuMemory:
                if attempt + 1 == _ATTEMPTS:
                    raise
            else:
                return

    def release(self, token: str) -> None:
        if (lease := self._leases.pop(token, None)) is not None:
            lease.close()


class OnGpu:
    """``with on_gpu(policy, reward): ...``: the models are on their GPUs, and nobody freezes them within the block.

    On entry those that are off come on, and idle models of one's own go off for them (unless ``evict`` is False, or
    there is no need). On exit nothing moves; they may be frozen again. It also ends when the driver does. Entering
    blocks; it raises InsufficientGpuMemory when there is no way to have all of them on.
    """

    def __init__(self, *models: Models, evict: bool = True) -> None:
        self._ids, _ = control.resolve(list(models))
        self._evict = evict
        self._token = ""
        self._holders: list[Any] = []

    def __enter__(self) -> Self:
        nodes = cluster.Cluster(agent.handle).locate(self._ids, control.TIMEOUT_S)
        self._token = f"{time.monotonic_ns()}"
        try:
            for node in sorted(set(nodes.values())):
                ids = [each for each in self._ids if nodes[each] == node]
                holder = _holder(node)
                self._holders.append(holder)
                held = holder.hold.remote(self._token, ids, evict=self._evict)
                cluster.get(held, node, _HOLD_TIMEOUT_S)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        refs = [holder.release.remote(self._token) for holder in self._holders]
        self._holders = []
        ray.wait(refs, num_returns=len(refs), timeout=_RELEASE_TIMEOUT_S) if refs else None


def on_gpu(*models: Models, evict: bool = True) -> OnGpu:
    """See ``OnGpu``."""
    return OnGpu(*models, evict=evict)


#: (job, node) -> this driver's holder there.
_holders: dict[tuple[str, str], Any] = {}


def _holder(node_id: str) -> Any:
    key = (ray.get_runtime_context().get_job_id(), node_id)
    if key not in _holders:
        pinned = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        _holders[key] = (
            ray.remote(LeaseHolder)
            .options(num_cpus=0, max_concurrency=16, scheduling_strategy=pinned)
            .remote()
        )
    return _holders[key]


class Phase:
    """What ``Phases.phase`` did. Usable as a context manager; its end moves nothing.

    Attributes:
        name: The phase.
        off: The daemon's results for the models that had to go off.
        on: And for those that are on now.
        duration_s: Seconds from the request to its end, draining included.
    """

    def __init__(self, name: str, off: list[Any], on: list[Any], duration_s: float) -> None:
        self.name = name
        self.off = off
        self.on = on
        self.duration_s = duration_s

    def __repr__(self) -> str:
        return (
            f"<Phase {self.name} [{len(self.on)} on, {len(self.off)} off, {self.duration_s:.3f} s]>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class Phases:
    """The phases of a loop, each with the models that it needs; all others are off their GPUs then.

    phases = Phases({"rollout": [policy], "score": [reward, reference], "train": [policy]})
    with phases.phase("score"):
        ...
    """

    def __init__(
        self, models: Mapping[str, Models], *, drain: bool = True, timeout_s: float = 60.0
    ) -> None:
        self._ids = {name: control.resolve(_several(each))[0] for name, each in models.items()}
        self._handles = dict(
            models
        )  # kept: a model must not go out of scope while its phase may come
        self._drain = drain
        self._timeout_s = timeout_s
        self._current: str | None = None

    def __repr__(self) -> str:
        return f"<Phases {', '.join(self._ids)} [now {self._current}]>"

    def phase(self, name: str) -> Phase:
        """Brings exactly this phase's models on, in one swap. Blocks. Raises what ``swap`` does; nothing moved then."""
        if name not in self._ids:
            raise errors.InvalidRequest(
                f"no phase is named {name!r}: there are {', '.join(self._ids)}"
            )
        on = self._ids[name]
        off = [each for ids in self._ids.values() for each in ids if each not in on]
        begun = time.monotonic()
        off_results, on_results = cluster.get(
            control.move(
                list(dict.fromkeys(off)), on, drain=self._drain, timeout_s=self._timeout_s
            ),
            "of the driver",
            self._timeout_s + cluster.MOVE_TIMEOUT_S,
        )
        self._current = name
        return Phase(name, off_results, on_results, time.monotonic() - begun)


def _several(models: Models) -> Models:
    return [models] if compat.is_handle(models) or isinstance(models, str) else models
