"""What the parts of the engine share: the node, the ports, and the few ways to change or tell anything.

All of it runs on the event loop inside ``Engine.run``; nothing here awaits. Slow work is handed to ``spawn``ed
coroutines, which touch no state and end by posting exactly one event.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from gpusched import errors, types
from gpusched.domain.capacity import Promise
from gpusched.domain.states import ProcState, Trigger
from gpusched.engine.disk_moves import DiskMover
from gpusched.engine.events import Broke, Event, Exited, Recorded
from gpusched.engine.model import Node, Operation, Process, to_record
from gpusched.engine.moves import Mover
from gpusched.engine.survey import Sampler, Surveyor
from gpusched.ports import (
    Clock,
    Description,
    Disk,
    Driver,
    Gpu,
    Host,
    Identity,
    Journal,
    Trees,
    Users,
)

log = logging.getLogger(__name__)

RECENT_EVENTS: Final = 20
#: The RAM budget where none was set.
RAM_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the daemon was told to keep to. Bytes and seconds."""

    #: None: a share of the RAM that the host has at the moment; a virtual machine's may grow.
    ram_budget_bytes: int | None
    #: How much of it the processes of one ordinary user may take; None: all.
    user_ram_budget_bytes: int | None
    disk_budget_bytes: int
    #: How much of the RAM budget is kept free ahead of need; 0: nothing.
    ram_reserve_bytes: int
    log_dir: Path
    lock_timeout_s: float
    kill_grace_s: float
    operation_wait_s: float
    #: Whether trees are started in namespaces of their own, where a request does not say.
    isolate: bool = False
    #: A library that every process that is run loads before all others; empty: none.
    preload: str = ""
    #: Put into every process that is run, under the caller's values / over them.
    default_env: Mapping[str, str] = field(default_factory=dict)
    forced_env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    driver: Driver
    trees: Trees
    host: Host
    clock: Clock
    journal: Journal
    users: Users
    disk: Disk


class EventLog:
    """The last events, and whoever listens. A listener that does not keep up is cut off by its own queue."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.recent: deque[types.Event] = deque(maxlen=RECENT_EVENTS)
        self.listeners: set[asyncio.Queue[types.Event | None]] = set()

    def emit(
        self,
        type_: str,
        process: str | None = None,
        detail: str | None = None,
        duration_ms: float | None = None,
    ) -> None:
        event: types.Event = {"time": rfc3339(self._clock.unix_s()), "type": type_}
        if process is not None:
            event["process"] = process
        if detail:
            event["detail"] = detail
        if duration_ms is not None:
            event["duration_ms"] = round(duration_ms)
        self.recent.append(event)
        log.info("event %s", " ".join(f"{k}={v}" for k, v in event.items()))
        for queue in tuple(self.listeners):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self.listeners.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)  # the reader's sign to hang up


class Core:
    """The node and everything that may be done with it."""

    def __init__(
        self, ports: Ports, description: Description, limits: Limits, tasks: asyncio.TaskGroup
    ) -> None:
        self.node = Node()
        self.ports = ports
        self.limits = limits
        self.description = description
        self.gpus: dict[str, Gpu] = {g.uuid: g for g in description.gpus}
        self.events = EventLog(ports.clock)
        self.mover = Mover(ports.driver, ports.trees, ports.clock, limits.lock_timeout_s)
        self.disk_mover = DiskMover(ports.disk, ports.trees, ports.clock)
        self.surveyor = Surveyor(ports.driver, ports.trees, ports.host, ports.clock, ports.disk)
        self.sampler = Sampler(ports.driver, ports.trees, ports.clock, tasks)
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        #: Events handled so far: while it stands still, so does everything that is known.
        self.handled = 0
        self.journal_is_behind = False
        self._tasks = tasks
        self._op_ids = itertools.count(1)

    # -- time, tasks, events ----------------------------------------------------------------------

    def post(self, event: Event) -> None:
        self.queue.put_nowait(event)

    def spawn(
        self, work: Coroutine[Any, Any, None], name: str, op_id: str | None = None
    ) -> asyncio.Task[None]:
        """Starts ``work``; when it ends by a defect, the operation ``op_id`` ends with it, and nothing else does.

        Tasks begin in the order of their making. What is recorded in the journal relies on it: records are made
        here and appended before the task awaits anything else, so that their order is that of the decisions. (The
        first record of a new entry may come later: nothing else is recorded of it before.)
        """
        return self._tasks.create_task(self._contain(work, op_id), name=name)

    async def _contain(self, work: Coroutine[Any, Any, None], op_id: str | None) -> None:
        try:
            await work
        except Exception as error:
            log.exception("a task failed op=%s", op_id)
            if op_id is not None:
                self.post(Broke(op_id=op_id, error=error))

    def new_op_id(self) -> str:
        return f"op-{next(self._op_ids)}"

    @property
    def unix_s(self) -> float:
        return self.ports.clock.unix_s()

    @property
    def monotonic_s(self) -> float:
        return self.ports.clock.monotonic_s()

    # -- processes --------------------------------------------------------------------------------

    def named(self, name: str) -> Process:
        process = self.node.by_name(name)
        if process is None:
            known = ", ".join(sorted(p.name for p in self.node.processes.values())[:10])
            raise errors.NotFound(
                f"no process named {name!r}; there is {known or 'none yet (gpusched run ...)'}"
            )
        return process

    def put(self, process: Process) -> Process:
        self.node.processes[process.tree_id] = process
        return process

    def apply(self, tree_id: str, trigger: Trigger, why: str, **changes: Any) -> Process:
        """The only way a state changes."""
        return self.put(self.node.processes[tree_id].after(trigger, why, self.unix_s, **changes))

    def remove(self, tree_id: str) -> None:
        del self.node.processes[tree_id]
        self.drop_leases(lambda lease_tree, _: lease_tree == tree_id)

    def drop_leases(self, matches: Callable[[str, int], bool]) -> int:
        """Ends the connection-bound leases for which ``matches(tree_id, connection)``; returns how many."""
        gone = [k for k, v in self.node.leases.items() if matches(v.tree_id, v.connection)]
        for key in gone:
            del self.node.leases[key]
        return len(gone)

    def mains(self) -> dict[str, Identity]:
        """The main process of every tree that lives."""
        return {
            p.tree_id: p.main
            for p in self.node.processes.values()
            if p.main is not None and p.state is not ProcState.DEAD
        }

    def uuids(self, indices: Sequence[int]) -> tuple[str, ...]:
        """The GPUs of these indices, as people count them. Raises InvalidRequest for one that is not there."""
        by_index = {g.index: g.uuid for g in self.gpus.values()}
        if unknown := [i for i in indices if i not in by_index]:
            raise errors.InvalidRequest(
                f"no GPU {unknown[0]}; there are GPUs {', '.join(map(str, sorted(by_index)))}"
            )
        return tuple(by_index[i] for i in indices)

    def watch(self, process: Process) -> None:
        """Posts Exited when the main process of a live tree ends."""
        assert process.main is not None
        self.spawn(self._watch(process.tree_id, process.main), f"watch-{process.name}")

    async def _watch(self, tree_id: str, main: Identity) -> None:
        status = await self.ports.trees.wait_exit(tree_id, main)
        self.post(Exited(tree_id=tree_id, main=main, status=status))

    def ram_budget_bytes(self) -> int:
        """What snapshots may take of host RAM in all."""
        fixed = self.limits.ram_budget_bytes
        return int(self.ports.host.ram().total_bytes * RAM_SHARE) if fixed is None else fixed

    def in_host_ram(self) -> list[Process]:
        """Whose VRAM contents lie in host RAM."""
        frozen = (ProcState.FROZEN, ProcState.THAWING, ProcState.HIBERNATING, ProcState.WAKING)
        return [p for p in self.node.processes.values() if p.state in frozen]

    def snapshots_bytes(self) -> int:
        """VRAM contents that lie in host RAM."""
        return sum(p.vram_bytes for p in self.in_host_ram())

    def disk_used_bytes(self) -> int:
        """What images take, each counted once."""
        return self.ports.disk.room().used_bytes

    def drop_images(self) -> None:
        """Deletes the images that no process is, or may have to go back to. What let go of them is recorded by now."""
        needed = {p.writing for p in self.node.processes.values()}
        needed |= {p.on_disk.image for p in self.node.processes.values() if p.on_disk}
        needed |= {op.image for op in self.node.operations.values()}
        for image_id in self.node.images - needed:
            self.node.images.discard(image_id)
            self.spawn(self.ports.disk.delete(image_id), f"delete-{image_id}")

    def forget_image(self, tree_id: str) -> None:
        """A process that lives has no use for its image any more."""
        self.put(replace(self.node.processes[tree_id], on_disk=None))

    def promises(self, *, except_op: str, since_s: float) -> list[Promise]:
        """What other operations may still take, as seen by a sample that was taken at ``since_s``."""
        running = [
            o.promise
            for o in self.node.operations.values()
            if o.promise is not None and o.op_id != except_op
        ]
        ended = [p for when, p in self.node.ended_promises if when >= since_s]
        return running + ended

    # -- operations -------------------------------------------------------------------------------

    def claim(self, op: Operation, tree_ids: Iterable[str]) -> None:
        """Makes trees busy with ``op``: nothing else touches them until it has ended."""
        for tree_id in tree_ids:
            assert tree_id not in self.node.busy, f"{tree_id} is busy"
            self.node.busy[tree_id] = op.op_id

    def finish(
        self, op: Operation, *, result: Any = None, error: BaseException | None = None
    ) -> None:
        """Ends ``op`` after its outcome is on disk: what a client is told survives a crash of the daemon."""
        op.error = error
        records = [*self.records_of(op.tree_ids), {"op_end": op.op_id}]
        self.spawn(self._record(op, result, records), f"record-{op.op_id}", op.op_id)

    async def _record(self, op: Operation, result: Any, records: list[dict[str, Any]]) -> None:
        failure: errors.GpuschedError | None = None
        try:
            await self.ports.journal.append(*records)
        except errors.GpuschedError as error:
            failure = error
        op.result = result
        self.post(Recorded(op_id=op.op_id, error=failure))

    def records_of(self, tree_ids: Iterable[str]) -> list[dict[str, Any]]:
        """The journal's view of these trees now; a tree that is gone is recorded as forgotten."""
        return [
            {"proc": to_record(self.node.processes[t])}
            if t in self.node.processes
            else {"forget": t}
            for t in tree_ids
        ]

    def reply(
        self, op: Operation, *, result: Any = None, error: BaseException | None = None
    ) -> None:
        """Ends ``op`` now: its trees are free again and its client hears of it."""
        del self.node.operations[op.op_id]
        for tree_id in [t for t, o in self.node.busy.items() if o == op.op_id]:
            del self.node.busy[tree_id]
        now = self.monotonic_s
        self.drop_images()
        if op.promise is not None:
            kept = [(when, p) for when, p in self.node.ended_promises if now - when < 30.0]
            self.node.ended_promises = [*kept, (now, op.promise)]
        if op.future.done():
            # Its client is gone; the operation was carried out all the same, but a lease has no holder.
            gone = op.caller.connection if op.caller is not None else None
            self.drop_leases(lambda _, connection: connection == gone)
            return
        if error is None:
            op.future.set_result(result)
        else:
            op.future.set_exception(self._with_story(op, error))

    def _with_story(self, op: Operation, error: BaseException) -> BaseException:
        if not isinstance(error, errors.GpuschedError):
            return error
        story = [
            entry
            for tree_id in op.tree_ids
            if tree_id in self.node.processes
            for entry in self.node.processes[tree_id].story
        ]
        return error.with_details(op=op.op_id, **({"story": story} if story else {}))


def rfc3339(unix_s: float) -> str:
    """Milliseconds, UTC: ``2026-01-31T12:00:00.123Z``."""
    text = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
