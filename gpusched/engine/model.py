"""What the engine knows: processes, operations, leases. Only ``engine.py`` changes them.

See also: ``docs/states.md`` for the states, ``domain/exchange.py`` for what an operation does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from gpusched import errors
from gpusched.domain.capacity import Promise
from gpusched.domain.exchange import Exchange, GpuMap
from gpusched.domain.moves import Outcome
from gpusched.domain.states import MOVING, ProcState, Trigger, transition
from gpusched.ports import ExitStatus, Identity

#: How much of its history a process carries into errors.
STORY_LENGTH: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, as the kernel says. ``privileged``: root, the daemon's own user, or the configured group."""

    uid: int
    gid: int
    pid: int
    connection: int
    privileged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLease:
    """A lease that ends by the wall clock, so that it survives a restart of the daemon."""

    lease_id: str
    uid: int
    expires_unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDisk:
    """An image of a process, and what the process's record knew by pid, by the pids inside."""

    image: str
    size_bytes: int
    created_unix_s: float
    oom_scores: dict[int, int] = field(default_factory=dict)
    moved: dict[int, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        process: Process,
        image: str,
        *,
        size_bytes: int,
        created_unix_s: float,
        pids: Mapping[int, int],
    ) -> OnDisk:
        """``pids``: host pid -> pid inside."""
        return cls(
            image=image,
            size_bytes=size_bytes,
            created_unix_s=created_unix_s,
            oom_scores=_by(process.oom_scores, pids),
            moved=_by(process.moved, pids),
        )

    def woken(self, pids: Mapping[int, int]) -> dict[str, Any]:
        """The changes to the record of a process that has come from here; ``pids``: pid inside -> host pid."""
        return {"oom_scores": _by(self.oom_scores, pids), "moved": _by(self.moved, pids)}


def _by(known: Mapping[int, Any], pids: Mapping[int, int]) -> dict[int, Any]:
    return {pids[pid]: value for pid, value in known.items() if pid in pids}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A managed tree of processes. This is also its journal record.

    ``vram[uuid]`` is in bytes: the last active value, exact after an operation. ``oom_scores`` are the ones to put
    back when it thaws. ``moved[pid]`` is the GPU map of members whose saved VRAM belongs elsewhere than ``gpus`` say:
    a migration had reached them and was taken back. On disk both go by the pids inside.
    """

    tree_id: str
    name: str
    uid: int
    user: str
    gpus: tuple[str, ...]
    started_unix_s: float
    last_used_unix_s: float
    state: ProcState = ProcState.STARTING
    main: Identity | None = None
    log_path: str | None = None
    adopted: bool = False
    isolated: bool = False
    own_network: bool = False
    evictable: bool = False
    #: Whether a freeze stops its CPU threads too. Else only its CUDA calls wait, and it cannot go to disk.
    stop: bool = True
    vram: dict[str, int] = field(default_factory=dict)
    oom_scores: dict[int, int] = field(default_factory=dict)
    moved: dict[int, dict[str, str]] = field(default_factory=dict)
    #: What its last freeze has left on GPUs, in bytes; decisions look at the GPUs themselves.
    kept: dict[str, int] = field(default_factory=dict)
    #: What holds it, or held it until a moment ago: kept until it runs again.
    on_disk: OnDisk | None = None
    #: The image that a hibernation is writing; complete, it is what the process is.
    writing: str | None = None
    #: The tree that this is a copy of, until the copy has run.
    copy_of: str | None = None
    exit: ExitStatus | None = None
    error: str | None = None
    timed_leases: tuple[TimedLease, ...] = ()
    story: tuple[str, ...] = ()

    def __repr__(self) -> str:
        pid = self.main.pid if self.main else "-"
        return f"<Process {self.name} {self.state.upper()} pid {pid}>"

    @property
    def vram_bytes(self) -> int:
        return sum(self.vram.values())

    def after(self, trigger: Trigger, why: str, unix_s: float, **changes: Any) -> Process:
        """This process after ``trigger``. Raises InvalidTransition where the table has no such pair."""
        state = transition(self.state, trigger)
        entry = f"{unix_s:.3f} {self.state} --{trigger}--> {state}: {why}"
        return replace(self, state=state, story=(*self.story, entry)[-STORY_LENGTH:], **changes)


def to_record(process: Process) -> dict[str, Any]:
    """The journal record of a process."""
    found: dict[str, Any] = msgspec.to_builtins(process, str_keys=True)
    return found


def from_record(record: Mapping[str, Any]) -> Process:
    """Raises msgspec.ValidationError for a record that does not fit."""
    return msgspec.convert(record, Process, strict=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of ``name``'s users to have it on the GPU, until its connection ends."""

    lease_id: str
    tree_id: str
    uid: int
    connection: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """What a move needs to know of its tree."""

    tree_id: str
    main: Identity
    vram: Mapping[str, int]
    oom_scores: Mapping[int, int]
    moved: Mapping[int, dict[str, str]] = field(default_factory=dict)
    uid: int = 0  # nobody else's processes are stopped; 0: root's tree, which may hold anybody's
    stop: bool = True

    @classmethod
    def of(cls, process: Process) -> Tree:
        """Of a process that has been started."""
        assert process.main is not None
        return cls(
            tree_id=process.tree_id,
            main=process.main,
            vram=process.vram,
            oom_scores=process.oom_scores,
            moved=process.moved,
            uid=process.uid,
            stop=process.stop,
        )


@dataclass(slots=True, kw_only=True)
class Report:
    """How a move ended and what it learned."""

    outcome: Outcome
    phases_ms: dict[str, float] = field(default_factory=dict)
    #: What the driver's own calls took, those at the same time counted once.
    driver_ms: float = 0.0
    oom_scores: dict[int, int] | None = None
    #: Members whose saved VRAM belongs to other GPUs now than the tree's record says, and by which map.
    moved: dict[int, dict[str, str]] = field(default_factory=dict)
    #: VRAM that a freeze has left to its contexts, in bytes for each GPU.
    kept: dict[str, int] = field(default_factory=dict)
    #: VRAM that members who came late to a freeze had on top, in bytes for each GPU.
    late: dict[str, int] = field(default_factory=dict)
    error: errors.GpuschedError | None = None
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Operation:
    """One request that moves or ends trees, from its arrival until it has ended.

    Waiting while one of its trees is busy (``started`` is False), then surveyed, decided and carried out. It ends
    once; ``future`` then has the result or the error, recorded durably before anyone hears of it.
    """

    op_id: str
    kind: str
    caller: Caller | None  # None: the engine itself, at recovery
    params: Any
    tree_ids: tuple[str, ...]
    future: asyncio.Future[Any]
    arrived_s: float
    started: bool = False
    begun_s: float = 0.0
    survey_ms: float = 0.0  # from the beginning until it was decided what to do
    exchange: Exchange | None = None
    promise: Promise | None = None
    evicted: tuple[str, ...] = ()
    #: Whether what is frozen may leave its context on the GPU; and how many bytes it has left there, by tree.
    keep_context: bool = False
    kept_bytes: dict[str, int] = field(default_factory=dict)
    #: Frozen trees whose contexts were asked to go for this.
    asked_to_go: frozenset[str] = frozenset()
    #: Frozen trees that cannot go to disk to make room, and why.
    unmovable: dict[str, str] = field(default_factory=dict)
    #: Of a fork: its copies before they are there, and the image that they come from; then their tree ids.
    planned: tuple[tuple[Process, GpuMap], ...] = ()
    image: str | None = None
    saved: OnDisk | None = None
    copies: tuple[str, ...] = ()
    before: dict[str, ProcState] = field(default_factory=dict)
    phases_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    durations_ms: dict[str, float] = field(default_factory=dict)
    driver_ms: dict[str, float] = field(default_factory=dict)
    error: BaseException | None = None
    result: Any = None

    def __repr__(self) -> str:
        phase = self.exchange.phase.name if self.exchange else "WAITING"
        return f"<Operation {self.op_id} {self.kind} {phase}>"


@dataclass(slots=True, kw_only=True)
class Counters:
    """What ``status`` reports as metrics; since the daemon's start."""

    requests: int = 0
    cache_hits: int = 0
    freezes: int = 0
    thaws: int = 0
    migrations: int = 0
    hibernations: int = 0
    forks: int = 0
    cold_starts: int = 0
    freeze_ms: float = 0.0
    thaw_ms: float = 0.0


@dataclass(slots=True, kw_only=True)
class Node:
    """All state of the daemon. ``busy[tree_id]`` is the operation that has the tree."""

    processes: dict[str, Process] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)  # in order of arrival
    busy: dict[str, str] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    #: Complete images on disk.
    images: set[str] = field(default_factory=set)
    #: Promises of operations that ended, with when: a sample taken earlier may not show what they took.
    ended_promises: list[tuple[float, Promise]] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    def by_name(self, name: str) -> Process | None:
        return next((p for p in self.processes.values() if p.name == name), None)

    def lease_count(self, tree_id: str, now_unix_s: float) -> int:
        timed = sum(t.expires_unix_s > now_unix_s for t in self.processes[tree_id].timed_leases)
        return timed + sum(lease.tree_id == tree_id for lease in self.leases.values())

    def check(self) -> None:
        """Invariants, one a line; raises AssertionError. Cheap enough for tests to call after every event."""
        names = [p.name for p in self.processes.values()]
        assert len(names) == len(set(names)), "a name twice"
        for tree_id, process in self.processes.items():
            assert process.tree_id == tree_id
            assert (
                process.state is ProcState.STARTING
                or process.main
                or process.exit
                or process.on_disk
            )
            assert process.state is not ProcState.HIBERNATED or process.on_disk, "nothing to wake"
            assert process.state not in MOVING or tree_id in self.busy, f"{process} moves alone"
        for tree_id, op_id in self.busy.items():
            assert op_id in self.operations, f"{tree_id} is busy with an operation that ended"
        for lease in self.leases.values():
            assert lease.tree_id in self.processes, "a lease on nothing"
