"""What can reach the engine. Everything that happens anywhere arrives as one of these, in one queue."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from gpusched.domain.exchange import Order
from gpusched.domain.moves import Outcome
from gpusched.engine.model import Caller
from gpusched.ports import DiskFacts, ExitStatus, HostRam, Identity, Member, Obstacle, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """A client asks for something that changes state. The answer goes into ``future``."""

    method: str
    params: Struct
    caller: Caller
    future: asyncio.Future[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A ``run`` or ``adopt`` came to its end, well (``main``) or not (``error``)."""

    op_id: str
    main: Identity | None = None
    uid: int = -1
    user: str = ""
    vram: dict[str, int] = field(default_factory=dict)
    is_frozen: bool = False
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeFacts:
    """One tree as the survey found it."""

    members: tuple[Member, ...]
    obstacles: tuple[Obstacle, ...]
    cgroup_room_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """The facts that an operation's decision needs; ``error`` when they could not be had."""

    op_id: str
    taken_s: float = 0.0
    usage: Usage | None = None
    held: dict[str, dict[str, int]] = field(default_factory=dict)
    ram: HostRam | None = None
    trees: dict[str, TreeFacts] = field(default_factory=dict)
    disk: dict[str, DiskFacts] = field(default_factory=dict)
    #: What has changed since an image was written, for each tree that is to be woken.
    changes: dict[str, list[str]] = field(default_factory=dict)
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """What a move to or from disk learned. ``pids`` are those before it -> those after it."""

    image: str | None = None
    image_bytes: int = 0
    main: Identity | None = None
    pids: dict[int, int] = field(default_factory=dict)
    #: The process is gone, and its image is what there is of it.
    back_on_disk: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveEnded:
    """The one end of one order. What is known only now comes along."""

    op_id: str
    order: Order
    outcome: Outcome
    duration_ms: float
    phases_ms: dict[str, float] = field(default_factory=dict)
    driver_ms: float = 0.0
    oom_scores: dict[int, int] | None = None
    moved: dict[int, dict[str, str]] | None = None
    kept: dict[str, int] | None = None
    late: dict[str, int] = field(default_factory=dict)
    disk: DiskReport | None = None
    error: BaseException | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The work on one image has ended: it was read, or deleted."""

    op_id: str
    result: dict[str, Any] | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """The copies of a fork that failed have been ended, but for ``left``."""

    op_id: str
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """A kill came to its end."""

    op_id: str
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """The main process of a tree has ended. ``seen_by_move``: the move under way found it gone, and ends by that."""

    tree_id: str
    main: Identity
    status: ExitStatus
    seen_by_move: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An operation's outcome is in the journal (or could not be: ``error``); now its client may hear of it."""

    op_id: str
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Broke:
    """Work for an operation ended as no work should: by a defect, so without the event that it owed."""

    op_id: str
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionClosed:
    """A client is gone, and its leases with it."""

    connection: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed: leases may have run out, waiting requests may be overdue."""


#: What ends a part of an operation; the field ``op_id`` says of which.
OfOperation = Surveyed | MoveEnded | Launched | Checked | Abandoned | Killed | Recorded
Event = OfOperation | Requested | Exited | Broke | ConnectionClosed | Tick
