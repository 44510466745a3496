"""What can be read of a machine. Plain values; None (or empty) wherever something could not be read.

Covers: the shapes. Does not cover: reading them (``read_*.py``) and what follows from them (``judge_*.py``).
Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpusched.mechanisms.criu.program import Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the doctor is asked about: the settings of a daemon as they would be on this machine."""

    backend: str = "cuda"
    allow_old_driver: bool = False
    socket_path: Path
    state_dir: Path
    disk_dir: Path | None = None
    criu: str | None = None  # the program to use, before any other


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """One GPU as NVML lists it."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    persistence: bool | None = None
    mig: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """The driver, NVML, the CUDA library and its bindings."""

    module_version: str | None = None  # of the kernel module; None: not loaded
    denied_devices: tuple[str, ...] = ()  # /dev/nvidia* that this user may not open
    driver_version: str | None = None
    nvml_error: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    bindings_version: str | None = None
    missing_calls: tuple[str, ...] = ()  # checkpoint calls that the bindings or the driver lack
    cuda_error: str | None = None
    mps_pids: tuple[int, ...] = ()
    unfinished: str | None = None  # what the probe was doing when its time ran out

    @property
    def vram_bytes(self) -> int:
        return sum(gpu.total_bytes for gpu in self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the kernel tells: who we are, memory, limits, and in what kind of machine we are."""

    python: str = ""
    kernel: str = ""
    euid: int = 0
    capabilities: int = 0  # CapEff
    ram_total_bytes: int | None = None
    ram_available_bytes: int | None = None
    group_room_bytes: int | None = None  # what our control group still may use; None: no limit
    huge_pages: str | None = None  # always, madvise or never
    memlock_bytes: int | None = None  # None: unlimited
    ptrace_scope: int | None = None  # None: no Yama
    cgroup: str | None = None  # our own version 2 group; None: there is none
    cgroup_writable: bool = False
    compiler: str | None = None
    library: str = ""
    clocksource: str | None = None
    container: str | None = None  # docker, podman, ...; None: not in one
    machine: str | None = None  # what the hypervisor or the board says; None: unknown
    virtual: bool = False
    own_pid_namespace: bool = False
    shm_bytes: int | None = None

    @property
    def is_root(self) -> bool:
        return self.euid == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """A directory that is there, or the nearest one above it."""

    path: str
    writable: bool
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    state: Directory
    snapshots: Directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """Whoever answers at the socket."""

    socket: str
    error: str | None = None  # why there was no answer
    version: str = ""
    backend: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Everything; ``unread`` says why for the topics (our own fields' names) that are None."""

    subject: Subject
    host: Host | None = None
    gpus: Gpus | None = None
    disk: Disk | None = None
    criu: Found | None = None
    daemon: Daemon | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
