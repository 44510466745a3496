"""Carrying out an exchange that was decided: intent on disk, moves performed, states changed, the end told.

The course: ``begin`` -> orders, each ended by MoveEnded -> more orders or the end. See also ``exchanges.py``, which
decides, ``moves.py`` and ``disk_moves.py``, which perform.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

from gpusched import errors
from gpusched.domain.exchange import Order, Phase
from gpusched.domain.moves import Move, Outcome
from gpusched.domain.states import ProcState, Trigger
from gpusched.engine.core import Core
from gpusched.engine.disk_moves import DiskTask
from gpusched.engine.events import DiskReport, Exited, MoveEnded
from gpusched.engine.leases import Leases
from gpusched.engine.model import Operation, Process, Tree, to_record
from gpusched.engine.outcomes import ON_DISK, changes_after, on_disk, refused, trigger_of
from gpusched.engine.results import Results
from gpusched.ports import Revival
from gpusched.protocol import messages as m

log = logging.getLogger(__name__)

_S = ProcState


class Orders:
    """Has the orders of exchanges performed, for whichever operation they belong to."""

    def __init__(self, core: Core, leases: Leases) -> None:
        self._core = core
        self._leases = leases
        self._results = Results(core)
        #: What follows the exchange of an operation that is more than one; else it has its result.
        self.then: dict[str, Callable[[Operation], None]] = {}

    def begin(self, op: Operation) -> None:
        assert op.exchange is not None
        self._carry_out(op, op.exchange.start())

    def give_up(self, op: Operation) -> None:
        """For an exchange that was refused: what it owes is given back, and its failure told."""
        assert op.exchange is not None
        op.before = {t: self._core.node.processes[t].state for t in op.tree_ids} | op.before
        self._carry_out(op, op.exchange.give_up())

    def nothing_to_do(self, op: Operation) -> None:
        """Answers a request whose goal was reached before; a lease by the clock is to survive the daemon."""
        if op.kind in self.then:
            op.before = {t: self._core.node.processes[t].state for t in op.tree_ids}
            self.then[op.kind](op)
            return
        lasting = getattr(op.params, "for_s", None) is not None
        end = self._core.finish if lasting else self._core.reply
        end(op, result=self._complete(op))

    def _carry_out(self, op: Operation, orders: list[Order]) -> None:
        """Records the intent, then has every order performed at the same time."""
        if not orders:
            self._conclude(op)
            return
        living = []
        for order in orders:
            process = self._core.node.processes[order.tree_id]
            if process.state is _S.DEAD:  # it waited for its turn, or to be taken back
                gone = errors.ProcessExited(f"{process.name} ended in the middle of the operation")
                self._core.post(refused(op.op_id, order, gone))
                continue
            if order.move is Move.THAW and process.state is _S.HIBERNATED:
                gone = errors.ProcessExited(f"{process.name} ended, and is on disk as it was")
                self._core.post(refused(op.op_id, order, gone))
                continue
            why = f"{op.kind} {op.op_id}" + (" (taking it back)" if order.is_undo else "")
            changes: dict[str, Any] = {}
            if order.move in (Move.HIBERNATE, Move.SAVE):
                image = f"{order.tree_id}-{uuid.uuid4().hex[:8]}"
                if order.move is Move.SAVE:
                    op.image = image
                else:
                    changes["writing"] = image
            self._core.apply(order.tree_id, Trigger(order.move), why, **changes)
            living.append(order)
        records = [*self._core.records_of(o.tree_id for o in orders), self.intent_of(op)]
        work = self._perform(op, living, records)
        self._core.spawn(work, f"orders-{op.op_id}", op.op_id)

    def intent_of(self, op: Operation) -> dict[str, Any]:
        """The journal record that lets recovery finish or undo an operation."""
        assert op.exchange is not None
        return {
            "op": {
                "op_id": op.op_id,
                "kind": op.kind,
                "off": list(op.exchange.off),
                "on": list(op.exchange.on),
                "down": [t for t, move in op.exchange.down.items() if move is Move.HIBERNATE],
                "before": {t: state.value for t, state in op.before.items()},
            }
        }

    async def _perform(
        self, op: Operation, orders: list[Order], records: list[dict[str, Any]]
    ) -> None:
        begun = self._core.monotonic_s
        try:
            await self._core.ports.journal.append(*records)
        except errors.GpuschedError as error:
            if not all(o.is_undo for o in orders):  # an undo is owed, recorded or not
                for order in orders:
                    self._core.post(refused(op.op_id, order, error))
                return
        record_ms = round((self._core.monotonic_s - begun) * 1000, 2)
        async with asyncio.TaskGroup() as moves:
            for order in orders:
                perform = self._move_disk if order.move in ON_DISK else self._move
                moves.create_task(
                    perform(op, order, record_ms), name=f"{order.move}-{order.tree_id}"
                )

    # -- performing -------------------------------------------------------------------------------

    async def _move(self, op: Operation, order: Order, record_ms: float) -> None:
        process = self._core.node.processes[order.tree_id]
        begun = self._core.monotonic_s
        report = await self._core.mover.run(
            Tree.of(process),
            order.move,
            order.gpu_map,
            keep_context=op.keep_context and order.move is Move.FREEZE and not order.is_undo,
        )
        outcome, disk = report.outcome, None
        if isinstance(report.error, errors.ProcessExited) or outcome is Outcome.LOST:
            disk = await self._fall_back(process, report.error)
            outcome = Outcome.ROLLED_BACK if disk else outcome
        self._core.post(
            MoveEnded(
                op_id=op.op_id,
                order=order,
                outcome=outcome,
                duration_ms=(self._core.monotonic_s - begun) * 1000,
                phases_ms={"record": record_ms, **report.phases_ms},
                driver_ms=report.driver_ms,
                oom_scores=report.oom_scores,
                moved=report.moved,
                kept=report.kept,
                late=report.late,
                disk=disk,
                error=report.error,
                note=report.note,
            )
        )

    async def _fall_back(self, process: Process, error: BaseException | None) -> DiskReport | None:
        """What is left of a process that a move has lost: its image, where it has just come from there.

        Otherwise, if it has ended, that is posted first, so that nobody hears of a process in some state that is in
        truth dead.
        """
        assert process.main is not None
        if process.on_disk is not None and process.isolated:
            await self._core.ports.trees.end(process.tree_id, process.main)
            await self._core.ports.trees.forget(process.tree_id)
            return DiskReport(back_on_disk=True)
        if isinstance(error, errors.ProcessExited):
            await self._report_exit(process)
        return None

    async def _report_exit(self, process: Process) -> None:
        assert process.main is not None
        status = await self._core.ports.trees.wait_exit(process.tree_id, process.main)
        self._core.post(
            Exited(tree_id=process.tree_id, main=process.main, status=status, seen_by_move=True)
        )

    async def _move_disk(self, op: Operation, order: Order, record_ms: float) -> None:
        process = self._core.node.processes[order.tree_id]
        begun = self._core.monotonic_s
        ended = await self._core.disk_mover.run(self._task(op, process, order.move), order.move)
        report = ended.report
        if isinstance(ended.error, errors.ProcessExited):
            report = await self._fall_back(process, ended.error) or report
        self._core.post(
            MoveEnded(
                op_id=op.op_id,
                order=order,
                outcome=ended.outcome,
                duration_ms=(self._core.monotonic_s - begun) * 1000,
                phases_ms={"record": record_ms, **ended.phases_ms},
                disk=report,
                error=ended.error,
                note=ended.note,
            )
        )

    def _task(self, op: Operation, process: Process, move: Move) -> DiskTask:
        held = process.on_disk.image if process.on_disk is not None else None
        image = {Move.HIBERNATE: process.writing, Move.SAVE: op.image}.get(move, held)
        assert image is not None
        record = {"proc": to_record(process), "for": "copies" if move is Move.SAVE else "itself"}
        return DiskTask(
            tree_id=process.tree_id,
            main=process.main,
            image=image,
            record=record,
            revival=Revival(
                tree_id=process.tree_id,
                name=process.name,
                log_path=process.log_path or "/dev/null",
                fresh_log=process.copy_of is not None,
                own_network=process.own_network,
            ),
        )

    # -- how they end -----------------------------------------------------------------------------

    def move_ended(self, op: Operation, ended: MoveEnded) -> None:
        """One order has ended: its process changes state, and the exchange says what is next."""
        assert op.exchange is not None
        tree_id = ended.order.tree_id
        before = self._core.node.processes[tree_id]
        changes = changes_after(before, ended, self._core.unix_s)
        why = (
            str(ended.error) if ended.error else f"{op.kind} {op.op_id}, {ended.duration_ms:.0f} ms"
        )
        process = self._core.apply(tree_id, trigger_of(ended), why, **changes)
        self._after_disk(op, ended, before, process)
        self._core.sampler.invalidate()
        if ended.error is not None and op.error is None:
            op.error = ended.error
        op.durations_ms[tree_id] = op.durations_ms.get(tree_id, 0.0) + ended.duration_ms
        op.driver_ms[tree_id] = op.driver_ms.get(tree_id, 0.0) + ended.driver_ms
        op.kept_bytes[tree_id] = sum((ended.kept or {}).values())
        phases = op.phases_ms.setdefault(tree_id, {"survey": round(op.survey_ms, 2)})
        phases.update(ended.phases_ms)
        self._tell(op, ended, process)
        nothing_left = ended.order.is_undo and isinstance(ended.error, errors.ProcessExited)
        orders = op.exchange.ended(tree_id, Outcome.DONE if nothing_left else ended.outcome)
        if orders or op.exchange.phase is Phase.ENDED:
            self._carry_out(op, orders)

    def _after_disk(
        self, op: Operation, ended: MoveEnded, before: Process, process: Process
    ) -> None:
        """Counts what was written, and watches: what has come back, and what may have ended while that was no news."""
        if (
            ended.outcome is Outcome.DONE
            and ended.disk is not None
            and ended.disk.image is not None
        ):
            if ended.order.move is Move.SAVE:
                op.saved = on_disk(before, ended.disk, self._core.unix_s)
            if ended.order.move in (Move.HIBERNATE, Move.SAVE):
                self._core.node.images.add(ended.disk.image)
            if ended.order.move is Move.HIBERNATE:
                self._core.node.counters.hibernations += 1
        near_disk = ended.order.move in ON_DISK or before.on_disk is not None
        if near_disk and process.main is not None and process.state is not _S.DEAD:
            self._core.watch(process)

    def _tell(self, op: Operation, ended: MoveEnded, process: Process) -> None:
        """Counts and announces one ended move."""
        counters, move = self._core.node.counters, ended.order.move
        if ended.outcome is not Outcome.DONE:
            type_ = "lost" if ended.outcome is Outcome.LOST else "rollback"
            self._core.events.emit(type_, process.name, f"{move}: {ended.error}")
        elif ended.order.is_undo:
            self._core.events.emit("rollback", process.name, f"{move} again after a failure")
        elif op.kind not in ("migrate", "fork"):
            if move is Move.FREEZE:
                counters.freezes += 1
                counters.freeze_ms += ended.duration_ms
            elif move is Move.THAW:
                counters.thaws += 1
                counters.thaw_ms += ended.duration_ms
                counters.cache_hits += 1
            type_ = "evict" if process.tree_id in op.evicted else move.value
            self._core.events.emit(type_, process.name, ended.note, duration_ms=ended.duration_ms)

    def _conclude(self, op: Operation) -> None:
        assert op.exchange is not None
        if op.kind in self.then:
            self.then[op.kind](op)
            return
        if op.exchange.outcome is Outcome.DONE:
            if op.kind == "migrate":
                self._core.node.counters.migrations += 1
                self._core.events.emit(
                    "migrate",
                    self._core.node.processes[op.tree_ids[0]].name,
                    duration_ms=self._results.elapsed_ms(op),
                )
            self._core.finish(op, result=self._complete(op))
            return
        self._core.finish(op, error=self.failure(op))

    def failure(self, op: Operation) -> errors.GpuschedError:
        """What the client is told when an exchange was rolled back, or worse."""
        return self._results.failure(op)

    def _complete(self, op: Operation) -> dict[str, Any]:
        """The result of an operation that reached its goal; an acquire gets its lease here."""
        result = self._results.of(op)
        if isinstance(op.params, m.Acquire):
            process = self._core.named(op.params.name)
            result |= self._leases.grant(process, op.caller, op.params.for_s)
        return result
