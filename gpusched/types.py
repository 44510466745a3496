"""The shapes of results, for typed clients and for the daemon that makes them. Standard library only.

Integers are JSON numbers without a fraction; ``*_mb`` are MiB, ``*_ms`` milliseconds.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class RunResult(TypedDict):
    name: str
    pid: int


class FreezeResult(TypedDict):
    """``to_disk``: who was sent there to make room; ``disk_mb``: what the process itself takes there.

    ``context_mb``, where a context was to be kept: what it still takes on the GPU.
    """

    name: str
    duration_ms: int
    tier: str
    mem_mb: int
    context_mb: NotRequired[int]
    disk_mb: NotRequired[int]
    to_disk: NotRequired[list[str]]
    phases_ms: NotRequired[dict[str, float]]
    path: NotRequired[str]
    driver_ms: NotRequired[float]
    simulated: NotRequired[bool]


class ThawResult(TypedDict):
    name: str
    duration_ms: int
    from_tier: str
    mem_mb: int
    evicted: NotRequired[list[str]]
    to_disk: NotRequired[list[str]]
    phases_ms: NotRequired[dict[str, float]]
    path: NotRequired[str]
    driver_ms: NotRequired[float]
    simulated: NotRequired[bool]


class SwapResult(TypedDict):
    duration_ms: int
    off: list[FreezeResult]
    on: list[ThawResult]


class ForkResult(TypedDict):
    """Each copy is in a network namespace of its own: no TCP but its own loopback. ``note`` says so, and why."""

    source: str
    copies: list[str]
    note: str
    duration_ms: NotRequired[int]
    simulated: NotRequired[bool]


class SnapshotStatus(TypedDict):
    """``size_mb`` is what it takes on disk, ``mem_mb`` the VRAM that its process will need."""

    name: str
    image: str
    size_mb: int
    mem_mb: int
    created: str
    age: str
    state: str
    user: str


class SnapshotsResult(TypedDict):
    snapshots: list[SnapshotStatus]


class SnapshotResult(TypedDict):
    name: str
    size_mb: int


class KillResult(TypedDict):
    name: str


class MigrateResult(TypedDict):
    name: str
    from_gpu: int
    to_gpu: int
    duration_ms: int
    mem_mb: int
    phases_ms: NotRequired[dict[str, float]]
    path: NotRequired[str]
    driver_ms: NotRequired[float]
    simulated: NotRequired[bool]


class AdoptResult(TypedDict):
    name: str
    pid: int
    mem_mb: int
    stop: bool


class AcquireResult(TypedDict):
    """``lease`` ends with the connection, or after ``expires_s`` seconds when that is not null."""

    name: str
    lease: str
    expires_s: float | None
    duration_ms: int
    from_tier: str
    mem_mb: int


class ReleaseResult(TypedDict):
    name: str
    released: int


class LogsResult(TypedDict):
    name: str
    lines: list[str]
    output: str


class GpuStatus(TypedDict):
    index: int
    name: str
    mem_total_mb: int
    mem_used_mb: int
    mem_free_mb: int
    uuid: str


class ProcessStatus(TypedDict):
    name: str
    pid: int
    state: str
    gpu: int
    mem_mb: int
    age: str
    started: str
    tier: str
    gpus: list[int]
    user: str
    uid: int
    adopted: bool
    isolated: bool
    own_network: bool
    evictable: bool
    stop: bool
    context_mb: int
    leases: int
    op: str | None
    exit_code: int | None
    exit_signal: int | None
    error: str | None


class MemoryStatus(TypedDict):
    host_ram_total_mb: int
    host_ram_free_mb: int
    host_ram_budget_mb: int
    snapshots_mb: int
    disk_used_mb: int
    disk_budget_mb: int


class Metrics(TypedDict):
    requests: int
    cache_hits: int
    freezes: int
    thaws: int
    forks: int
    migrations: int
    hibernations: int
    cold_starts: int
    avg_freeze_ms: int
    avg_thaw_ms: int


class Event(TypedDict):
    time: str
    type: str
    process: NotRequired[str]
    detail: NotRequired[str]
    duration_ms: NotRequired[int]


class Capabilities(TypedDict):
    cuda_checkpoint: bool
    criu: bool
    driver_version: NotRequired[str]
    backend: NotRequired[str]
    simulated: NotRequired[bool]
    migrate: NotRequired[bool]


class Status(TypedDict):
    gpus: list[GpuStatus]
    processes: list[ProcessStatus]
    memory: MemoryStatus
    metrics: Metrics
    recent_events: list[Event]
    capabilities: Capabilities
    version: NotRequired[str]
    pid: NotRequired[int]
