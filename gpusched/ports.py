"""What the engine needs from the world: interfaces and the plain values that cross them.

Mechanisms implement these; tests script them. Nothing here does any work.

Units: ``*_bytes`` bytes, ``*_s`` seconds (monotonic unless ``_unix``), pids are host pids. GPUs are named by UUID
("GPU-...."); an index is only how people say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol


class DriverState(StrEnum):
    """What the driver says of one process. Unknown numbers become UNKNOWN: newer drivers add states."""

    NONE = "none"  # the process has no CUDA state (or is gone)
    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    CHANGING = "changing"  # a checkpoint or restore is under way
    FAILED = "failed"
    UNKNOWN = "unknown"


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

    def checkpoint(self, pid: int) -> None:
        """LOCKED -> CHECKPOINTED: device memory to host memory, the GPU is released."""
        ...

    def restore(self, pid: int, gpu_map: Mapping[str, str] | None) -> None:
        """CHECKPOINTED -> LOCKED, onto the GPUs that ``gpu_map`` (a full permutation, UUID to UUID) says."""
        ...

    def unlock(self, pid: int) -> None:
        """LOCKED -> RUNNING."""
        ...

    def absorb(self, pid: int) -> None:
        """CHECKPOINTED stays so; what was kept of it outside of the process is in the process's own memory after it.

        For who saves the process or copies it. Works on a stopped process.
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
    async def checkpoint(self, pid: int, deadline_s: float) -> Took: ...
    async def restore(
        self, pid: int, gpu_map: Mapping[str, str] | None, deadline_s: float
    ) -> Took: ...
    async def unlock(self, pid: int) -> float: ...
    async def absorb(self, pid: int, deadline_s: float) -> float: ...
    async def obstacles(self, pids: Sequence[int]) -> list[Obstacle]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process for ever: a pid alone is reused. ``start_ticks`` is field 22 of /proc/PID/stat."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of a tree, read from /proc at one instant."""

    pid: int
    start_ticks: int
    ruid: int
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """All that a supervisor needs to start a command. Paths are absolute; ``env`` is complete.

    ``isolated``: in a PID and mount namespace of the tree's own, which is what can be saved to disk.
    """

    tree_id: str
    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    log_path: str
    isolated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How the main process of a tree ended. Both None: it ended and nobody saw how (adopted processes)."""

    code: int | None = None
    signal: int | None = None


class Trees(Protocol):
    """Processes and their descendants: starting, finding, stopping, ending. Never signals a bare pid."""

    async def launch(self, launch: Launch) -> Identity:
        """Starts a command under its own supervisor, which outlives the daemon.

        Raises InvalidRequest when the command cannot be executed (no such file, no permission, bad cwd).
        """
        ...

    async def identify(self, pid: int) -> Identity:
        """Raises NotFound when no such process runs."""
        ...

    async def is_alive(self, identity: Identity) -> bool: ...

    async def members(self, tree_id: str, main: Identity) -> list[Member]:
        """Every live process of the tree, the main one first; empty when all are gone. Zombies are left out."""
        ...

    async def locate(self, pids: Sequence[int], mains: Mapping[str, Identity]) -> dict[int, str]:
        """Which of the trees ``mains`` (tree id -> main process) each pid belongs to; others are left out."""
        ...

    async def signal(self, members: Sequence[Member], signal: int) -> None:
        """Sends by pidfd, after checking each start time; members that are gone are passed over."""
        ...

    async def set_oom_score(
        self, members: Sequence[Member], score: int | Mapping[int, int]
    ) -> dict[int, int]:
        """Sets oom_score_adj, for all or for each pid; returns the old ones. Never raises."""
        ...

    async def wait_exit(self, tree_id: str, main: Identity) -> ExitStatus:
        """Returns when the main process has ended; at most 2 s later than that the status is known or never."""
        ...

    async def record_adopted(self, launch: Launch, main: Identity) -> None:
        """Writes the per-tree record of a process that somebody else started, so that recovery can find it."""
        ...

    async def exit_status(self, tree_id: str) -> ExitStatus | None:
        """What the supervisor wrote when the main process ended; None while it lives or where nobody wrote."""
        ...

    async def leftovers(self) -> list[tuple[str, Launch, Identity]]:
        """Trees that a supervisor of this state directory started and that still run, for recovery."""
        ...

    async def end(self, tree_id: str, main: Identity | None) -> None:
        """Ends all of an isolated tree at once, by its init; returns when nothing of it is left.

        Raises DriverError when the kernel does not let go of it within a minute.
        """
        ...

    async def forget(self, tree_id: str) -> None:
        """Removes the supervisor's files of a tree that has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRoom:
    """``used_bytes``: all images; ``free_bytes``: what the file system has left for more."""

    used_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What saving one tree meets: bytes of its image at most; files open for writing, which copies would share."""

    obstacles: tuple[Obstacle, ...]
    need_bytes: int
    shared_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A committed image. ``pids``: host pid -> pid inside, of every member."""

    size_bytes: int
    pids: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """Processes that came back, stopped. ``pids``: pid inside -> host pid."""

    main: Identity
    pids: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A complete image. ``record`` is what the engine wanted kept with it; ``pids``: see ``Saved``.

    ``problem`` says why nothing can be read of it; then the rest is empty.
    """

    image_id: str
    size_bytes: int
    created_unix_s: float = 0.0
    record: Mapping[str, object] = field(default_factory=dict)
    pids: Mapping[int, int] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revival:
    """How processes are to come back from an image: as which tree, with which log, and in which network."""

    tree_id: str
    name: str
    log_path: str
    fresh_log: bool
    own_network: bool


class Disk(Protocol):
    """Isolated trees as images on disk. Every image is whole, synced and checked, or not there."""

    def why_not(self) -> str: ...  # nothing can be saved on this machine; empty when it can
    def room(self) -> DiskRoom: ...

    async def look(
        self, tree_id: str, main: Identity, members: Sequence[Member], record: Mapping[str, object]
    ) -> DiskFacts:
        """What would be in the way of ``save``. Touches nothing."""
        ...

    async def save(
        self,
        image_id: str,
        tree_id: str,
        main: Identity,
        members: Sequence[Member],
        record: Mapping[str, object],
    ) -> Saved:
        """Saves stopped processes, which stay as they are. Blocks for as long as the disk takes.

        Raises CriuError, InsufficientDisk, DeadlineExceeded; then nothing of the image is left.
        """
        ...

    async def changes(self, image_id: str) -> list[str]:
        """What is not any more as the image needs it, each for a person to read; empty: it can be woken.

        Raises NotFound where there is no such image.
        """
        ...

    async def wake(self, image_id: str, revival: Revival) -> Woken:
        """The processes of an image, stopped, in fresh namespaces. The image stays.

        Raises CriuError, InsufficientHostMemory, NotFound, DeadlineExceeded; then no process is left.
        """
        ...

    async def images(self) -> list[Image]:
        """All complete images; what a dead daemon left half done is cleared away first."""
        ...

    async def verify(self, image_id: str) -> None:
        """Reads all of an image. Raises CriuError naming the file that is not what was written."""
        ...

    async def delete(self, image_id: str) -> None:
        """Never raises for one that is gone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRam:
    total_bytes: int
    available_bytes: int


class Host(Protocol):
    def ram(self) -> HostRam: ...
    def cgroup_room_bytes(self, pid: int) -> int | None:
        """Bytes until the memory limit of the pid's cgroup (and its parents); None without a limit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """An account as the system knows it; an unknown uid has its number as name and / as home."""

    name: str
    home: str
    shell: str
    groups: tuple[int, ...]


class Users(Protocol):
    async def lookup(self, uid: int, gid: int) -> User:
        """May ask a directory service; never raises for an unknown uid."""
        ...


class Clock(Protocol):
    def monotonic_s(self) -> float: ...
    def unix_s(self) -> float: ...


class Journal(Protocol):
    """Durable memory of the engine: one JSON object a record, in order."""

    async def append(self, *records: Mapping[str, object]) -> None:
        """Returns when the records are on disk (fsync). Raises InsufficientDisk; then nothing was recorded."""
        ...

    async def rewrite(self, records: Iterable[Mapping[str, object]]) -> None:
        """Replaces all records at once, in order with the appends. Raises InsufficientDisk; the old ones stay."""
        ...

    @property
    def size_bytes(self) -> int: ...
