"""The single writer: one task takes events from one queue and changes the node; nothing else does.

| what | where |
|---|---|
| the queue, waiting requests, who may begin | here |
| freeze, thaw, swap, migrate, acquire, hibernate | ``exchanges.py``, ``orders.py`` |
| fork | ``forks.py`` |
| run, adopt | ``lifecycle.py`` |
| kill, exits | ``endings.py`` |
| leases | ``leases.py`` |
| what ``status`` says | ``report.py`` |

A request that moves trees waits until none of its trees is busy and no earlier request waits for one of them; so
requests for one process are answered in order, and an exchange of several begins whole. Kills go first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, assert_never

from gpusched import errors, types
from gpusched.domain.exchange import Phase
from gpusched.domain.states import MOVING, ProcState, Trigger
from gpusched.engine.admission import require_owner
from gpusched.engine.core import Core, Limits, Ports
from gpusched.engine.endings import Endings
from gpusched.engine.events import (
    Abandoned,
    Broke,
    Checked,
    ConnectionClosed,
    Event,
    Exited,
    Killed,
    Launched,
    MoveEnded,
    OfOperation,
    Recorded,
    Requested,
    Surveyed,
    Tick,
)
from gpusched.engine.exchanges import Exchanges
from gpusched.engine.forks import Forks
from gpusched.engine.leases import Leases
from gpusched.engine.lifecycle import Lifecycle
from gpusched.engine.model import Caller, Operation, Process
from gpusched.engine.orders import Orders
from gpusched.engine.report import Reporter
from gpusched.engine.results import names
from gpusched.engine.snapshots import Snapshots
from gpusched.ports import Description
from gpusched.protocol import messages as m

if TYPE_CHECKING:
    from msgspec import Struct

log = logging.getLogger(__name__)

TICK_S: Final = 1.0
#: The journal is rewritten with what is true now when it has grown past this.
JOURNAL_LIMIT_BYTES: Final = 4 * 1024 * 1024


class Engine:
    """Owns the node. ``submit`` and ``status`` are for servers; ``run`` is the one task."""

    def __init__(
        self,
        ports: Ports,
        description: Description,
        limits: Limits,
        tasks: asyncio.TaskGroup,
        *,
        version: str,
    ) -> None:
        self.core = Core(ports, description, limits, tasks)
        self._leases = Leases(self.core)
        self._orders = Orders(self.core, self._leases)
        self._exchanges = Exchanges(self.core, self._leases, self._orders)
        self._forks = Forks(self.core, self._exchanges, self._orders)
        self._lifecycle = Lifecycle(self.core)
        self._endings = Endings(self.core, self._leases)
        self._snapshots = Snapshots(self.core)
        self._reporter = Reporter(self.core, version)
        self._closing = False
        self._idle = asyncio.Event()
        #: Called after every event; tests check invariants here.
        self.after_event: Callable[[], None] | None = None

    # -- for servers ------------------------------------------------------------------------------

    async def submit(self, method: str, params: Struct, caller: Caller) -> Any:
        """Carries out a request and returns its result; blocks until it has ended. Raises GpuschedError.

        Cancelling the wait does not cancel the operation.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.core.post(Requested(method=method, params=params, caller=caller, future=future))
        return await future

    async def status(self) -> types.Status:
        """The wire's status. Waits for nothing but, briefly, a sample of VRAM."""
        sample = await self.core.sampler.recent(self.core.mains)
        return self._reporter.status(sample)

    def snapshots(self, caller: Caller) -> types.SnapshotsResult:
        """The images of the caller's processes."""
        return self._snapshots.listed(caller)

    def process_for(self, name: str, caller: Caller) -> Process:
        """The process of that name, for reading its log. Raises NotFound, PermissionDenied."""
        process = self.core.named(name)
        require_owner(caller, process)
        return process

    def count_request(self) -> None:
        self.core.node.counters.requests += 1

    async def close(self, timeout_s: float) -> None:
        """Takes no new requests and waits until running operations have ended; processes live on.

        Raises TimeoutError when some have not ended by then; the next daemon will sort them out.
        """
        self._closing = True
        self.core.post(Tick())
        async with asyncio.timeout(timeout_s):
            await self._idle.wait()

    # -- the loop ---------------------------------------------------------------------------------

    def take_over(self, processes: Iterable[Process]) -> None:
        """Puts recovered processes into the node and watches the live ones. Before ``run``."""
        for process in processes:
            self.core.put(process)
            if process.on_disk is not None:
                self.core.node.images.add(process.on_disk.image)
            if process.state is not ProcState.DEAD and process.main is not None:
                self.core.watch(process)

    async def run(self) -> None:
        """Handles events for ever; ends only by cancellation."""
        self.core.spawn(self._tick(), "tick")
        while True:
            event = await self.core.queue.get()
            try:
                self._handle(event)
                self._begin_waiting()
            except Exception as error:
                # A defect must not stop the daemon: the operation it hit ends with an error.
                log.exception("event failed event=%r", event)
                self._abandon(event, error)
            self.core.handled += 1
            if self._closing and not self.core.node.operations:
                self._idle.set()
            if self.after_event is not None:
                self.after_event()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.core.post(Tick())

    def _handle(self, event: Event) -> None:
        match event:
            case Requested():
                self._arrive(event)
            case (
                Surveyed()
                | MoveEnded()
                | Launched()
                | Checked()
                | Abandoned()
                | Killed()
                | Recorded()
            ):
                op = self.core.node.operations.get(event.op_id)
                if op is None:
                    log.error("an end without its operation: %r", event)
                    return
                self._advance(op, event)
            case Exited():
                self._endings.exited(event)
            case Broke():
                self._abandon(event, event.error)
            case ConnectionClosed():
                self.core.drop_leases(lambda _, connection: connection == event.connection)
            case Tick():
                self._housekeeping()
            case _:
                assert_never(event)

    def _advance(self, op: Operation, event: OfOperation) -> None:
        match event:
            case Surveyed():
                try:
                    self._exchanges.surveyed(op, event)
                except errors.GpuschedError as error:
                    if not self._forks.refused(op, error):
                        self.core.reply(op, error=error)
            case MoveEnded():
                self._orders.move_ended(op, event)
            case Checked():
                self._snapshots.ended(op, event)
            case Abandoned():
                self._forks.abandoned(op, event)
            case Launched():
                self._lifecycle.launched(op, event)
            case Killed():
                self._endings.killed(op, event)
            case Recorded():
                if event.error is not None:
                    log.error("the journal is behind: %s", event.error)
                    self.core.journal_is_behind = True
                    self.core.events.emit("journal", detail=str(event.error))
                failure = op.error if op.result is None else None
                self.core.reply(op, result=op.result, error=failure)
            case _:
                assert_never(event)

    # -- requests ---------------------------------------------------------------------------------

    def _arrive(self, event: Requested) -> None:
        if event.future.done():
            return  # its client went away first
        try:
            if self._closing:
                raise errors.ShuttingDown("the daemon is shutting down; try again in a moment")
            self._dispatch(event)
        except errors.GpuschedError as error:
            event.future.set_exception(error)

    def _dispatch(self, event: Requested) -> None:
        params = event.params
        op = Operation(
            op_id=self.core.new_op_id(),
            kind=event.method,
            caller=event.caller,
            params=params,
            tree_ids=(),
            future=event.future,
            arrived_s=self.core.monotonic_s,
        )
        match params:
            case m.Run() | m.Adopt():
                self.core.node.operations[op.op_id] = op
                try:
                    self._lifecycle.enter(op)
                except errors.GpuschedError:
                    del self.core.node.operations[op.op_id]
                    raise
            case m.Release():
                process = self._owned(params.name, event.caller)
                op.tree_ids, op.started = (process.tree_id,), True
                self.core.node.operations[op.op_id] = op
                released = self._leases.release(process, event.caller)
                self.core.finish(op, result={"name": process.name, "released": released})
            case m.Swap():
                wanted = dict.fromkeys([*names(params.off), *names(params.on)])
                trees = [self._owned(name, event.caller).tree_id for name in wanted]
                self._enqueue(op, tuple(trees))
            case (
                m.Freeze()
                | m.Thaw()
                | m.Migrate()
                | m.Acquire()
                | m.Kill()
                | m.Hibernate()
                | m.Fork()
                | m.VerifySnapshot()
                | m.DeleteSnapshot()
            ):
                if isinstance(params, m.Migrate) and params.gpu is None and params.gpus is None:
                    raise errors.InvalidRequest("gpu is missing: the index of the GPU to move to")
                self._enqueue(op, (self._owned(params.name, event.caller).tree_id,))
            case _:
                raise errors.InternalError(f"{event.method} has no handler")

    def _owned(self, name: str, caller: Caller) -> Process:
        process = self.core.named(name)
        require_owner(caller, process)
        return process

    def _enqueue(self, op: Operation, tree_ids: tuple[str, ...]) -> None:
        op.tree_ids = tree_ids
        operations = self.core.node.operations
        if op.kind == "kill":
            self.core.node.operations = {op.op_id: op, **operations}
        else:
            operations[op.op_id] = op

    def _begin_waiting(self) -> None:
        """Begins, in order, every request whose trees are free and not wanted by an earlier one."""
        self._exchanges.resume()
        wanted: set[str] = set()
        for op in list(self.core.node.operations.values()):
            if op.started:
                continue
            trees = set(op.tree_ids)
            if trees & wanted or trees & self.core.node.busy.keys():
                wanted |= trees
                self._exchanges.ahead.give_way(trees)
                continue
            self._begin(op)

    def _begin(self, op: Operation) -> None:
        op.started, op.begun_s = True, self.core.monotonic_s
        try:
            gone = [t for t in op.tree_ids if t not in self.core.node.processes]
            if gone:
                raise errors.NotFound("the process was killed while this request waited for it")
            self.core.claim(op, op.tree_ids)
            if op.kind == "kill":
                self._endings.kill(op)
            elif op.kind == "fork":
                self._forks.start(op)
            elif op.kind.endswith("_snapshot"):
                self._snapshots.start(op)
            else:
                self._exchanges.start(op)
        except errors.GpuschedError as error:
            self.core.reply(op, error=error)
        except Exception as error:
            # Here, not in ``run``: the event at hand may belong to another operation.
            log.exception("an operation cannot begin op=%r", op)
            self._give_up(op, error)

    def _abandon(self, event: Event, error: Exception) -> None:
        """After a defect: the operation that it hit, if any, ends with an internal error."""
        future = event.future if isinstance(event, Requested) else None
        op = self.core.node.operations.get(getattr(event, "op_id", ""))
        if op is not None:
            self._give_up(op, error)
        elif future is not None and not future.done():
            future.set_exception(_defect(error))

    def _give_up(self, op: Operation, error: Exception) -> None:
        """Ends ``op`` after a defect. Trees in the middle of a move are failed: a freeze or thaw looks at them anew."""
        wrapped = _defect(error)
        for tree_id in op.tree_ids:
            process = self.core.node.processes.get(tree_id)
            if process is not None and process.state is ProcState.WAKING:
                self.core.apply(tree_id, Trigger.FOUND_HIBERNATED, str(wrapped), error=str(wrapped))
            elif process is not None and process.state in MOVING:
                self.core.apply(tree_id, Trigger.FOUND_BROKEN, str(wrapped), error=str(wrapped))
            elif process is not None and process.state is ProcState.STARTING:
                self.core.remove(tree_id)
        self.core.journal_is_behind = True
        self.core.reply(op, error=wrapped)

    # -- time -------------------------------------------------------------------------------------

    def _housekeeping(self) -> None:
        """Overdue requests, leases that ran out, a journal that is behind or long."""
        for op in list(self.core.node.operations.values()):
            waited = self.core.monotonic_s - op.arrived_s
            if not op.started and waited > self.core.limits.operation_wait_s:
                busy = {self.core.node.busy.get(t) for t in op.tree_ids} - {None}
                self.core.reply(
                    op,
                    error=errors.DeadlineExceeded(
                        f"waited {waited:.0f} s for running operations ({', '.join(map(str, busy))}); nothing was done"
                    ),
                )
        if self._closing:
            self._exchanges.ahead.give_way(self.core.node.busy)
        elif (own := self._exchanges.ahead.next()) is not None:
            self._enqueue(own, own.tree_ids)
        self._leases.end_overdue()
        if self.core.journal_is_behind or self._journal_is_long():
            self.core.journal_is_behind = False
            records = [*self.core.records_of(self.core.node.processes), *self._open_intents()]
            self.core.spawn(self._rewrite(records), "journal-rewrite")

    def _journal_is_long(self) -> bool:
        return self.core.ports.journal.size_bytes > JOURNAL_LIMIT_BYTES

    def _open_intents(self) -> list[dict[str, Any]]:
        return [
            self._orders.intent_of(op)
            for op in self.core.node.operations.values()
            # One that has ended is in the journal with its end, or will be: it must not come to life again.
            if op.promise is not None and op.exchange and op.exchange.phase is not Phase.ENDED
        ]

    async def _rewrite(self, records: list[dict[str, Any]]) -> None:
        try:
            await self.core.ports.journal.rewrite(records)
        except errors.GpuschedError as error:
            log.warning("the journal stays as it is: %s", error)
            self.core.journal_is_behind = True


def _defect(error: Exception) -> errors.InternalError:
    return errors.InternalError(f"a defect in gpusched ({error!r}); the daemon's log has more")
