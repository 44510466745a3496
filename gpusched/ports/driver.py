"""The GPU driver: what a backend is, says and does. See the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Protocol


class DriverState(StrEnum):
    """What the driver says of one process. Unknown numbers become UNKNOWN: newer drivers add states."""

    NONE = "none"  # the process has no CUDA state (or is gone)
    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    PARKED = "parked"  # as checkpointed, but its context is still on the GPU
    CHANGING = "changing"  # a checkpoint or restore is under way
    FAILED = "failed"
    UNKNOWN = "unknown"


#: The contents of its VRAM are not on the GPU.
OFF_GPU: Final = frozenset({DriverState.CHECKPOINTED, DriverState.PARKED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One physical (or simulated) GPU."""

    index: int
    uuid: str
    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a driver backend is and can do; constant while the daemon runs."""

    backend: str  # "cuda" or "sim"
    simulated: bool
    driver_version: str
    gpus: tuple[Gpu, ...]
    can_migrate: bool
    #: What a context that stays on a GPU is taken for before it is there, for each process.
    context_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    total_bytes: int
    used_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """VRAM at one instant. ``processes[pid][uuid]`` is in bytes."""

    gpus: dict[str, GpuMemory]
    processes: dict[int, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """A reason why a process must not be checkpointed, found before it is touched.

    ``certain`` obstacles cannot be forced; the others say that we could not tell.
    """

    pid: int
    kind: str  # "managed_memory", "ipc", "nccl_p2p", "mig", "mps", ...
    message: str  # what, and the way out
    certain: bool = True


class Took(float):
    """The seconds that a checkpoint or restore took, and how it went.

    ``path``: "direct" past the driver's own copy, "own" from the process's own memory, "driver" by its copy.
    """

    path: str = "driver"
    phases_ms: Mapping[str, float] = MappingProxyType({})

    @classmethod
    def how(cls, seconds: float, path: str, phases_ms: Mapping[str, float]) -> Took:
        took = cls(seconds)
        took.path, took.phases_ms = path, phases_ms
        return took


class DriverApi(Protocol):
    """The driver's calls as a backend makes them: blocking, one thread per call, safe from many threads.

    Lives in the helper process. Every method may raise ``errors.DriverError`` (details: call, result, pid).
    After an error of ``lock``, ``checkpoint``, ``restore`` or ``unlock`` the only truth is ``state``.
    """

    def describe(self) -> Description: ...
    def usage(self) -> Usage: ...

    def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        """Never blocks for long; a pid without CUDA state, or gone, is NONE."""
        ...

    def lock(self, pid: int, timeout_s: float) -> None:
        """CUDA calls of ``pid`` block from here on. Raises LockTimeout: the process runs on, unlocked."""
        ...

    def checkpoint(self, pid: int, *, keep_context: bool = False) -> None:
        """LOCKED or PARKED -> CHECKPOINTED: device memory to host memory, the GPU is released.

        ``keep_context``: LOCKED -> PARKED where the backend and the process can, which is faster both ways.
        """
        ...

    def restore(self, pid: int, gpu_map: Mapping[str, str] | None) -> None:
        """CHECKPOINTED or PARKED -> LOCKED, onto the GPUs that ``gpu_map`` (a full permutation, UUID to UUID) says."""
        ...

    def unlock(self, pid: int) -> None:
        """LOCKED -> RUNNING."""
        ...

    def absorb(self, pid: int) -> None:
        """CHECKPOINTED stays so; what was kept of it outside of the process is in the process's own memory after it.

        For who saves the process or copies it. Works on a stopped process. Raises DriverError for a PARKED one, which
        is as it was: what is on a GPU cannot be saved.
        """
        ...

    def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        """What would make a checkpoint, or the restore after it, fail. Touches nothing."""
        ...


class Driver(Protocol):
    """``DriverApi`` as the engine sees it: awaited, with deadlines, in a process that may crash or hang.

    Raises what the API raises, and DeadlineExceeded or Unavailable when the helper hung or died: then the call may
    or may not have happened, and ``states`` tells. The calls that change something return the seconds that the
    driver itself took.
    """

    async def describe(self) -> Description: ...
    async def usage(self) -> Usage: ...
    async def states(self, pids: Sequence[int]) -> dict[int, DriverState]: ...
    async def lock(self, pid: int, timeout_s: float) -> float: ...
    async def checkpoint(
        self, pid: int, deadline_s: float, *, keep_context: bool = False
    ) -> Took: ...
    async def restore(
        self, pid: int, gpu_map: Mapping[str, str] | None, deadline_s: float
    ) -> Took: ...
    async def unlock(self, pid: int) -> float: ...
    async def absorb(self, pid: int, deadline_s: float) -> float: ...
    async def obstacles(self, pids: Sequence[int]) -> list[Obstacle]: ...
