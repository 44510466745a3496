"""Freeze, thaw, swap, migrate, acquire: everything that is an exchange of trees, from request to answer.

The course of one, in events: start (who goes off, who comes on) -> Surveyed (facts) -> a decision -> orders, each
ended by MoveEnded -> more orders or the end. ``domain/exchange.py`` knows the order of moves, ``admission.py`` the
conditions; here they meet the node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from gpusched import errors
from gpusched.domain.eviction import Candidate, choose_victims
from gpusched.domain.exchange import Exchange, GpuMap, Order, Phase
from gpusched.domain.moves import Move, Outcome
from gpusched.domain.placement import permutation
from gpusched.domain.states import ProcState, Trigger
from gpusched.engine import admission
from gpusched.engine.core import Core
from gpusched.engine.events import Exited, MoveEnded, Surveyed
from gpusched.engine.leases import Leases
from gpusched.engine.model import Operation, Process, Tree
from gpusched.engine.results import Results, names
from gpusched.protocol import messages as m

log = logging.getLogger(__name__)

_S = ProcState
#: Where an exchange may begin; the failed are tried again, since every step asks the driver first.
_CAN_GO_OFF: Final = (_S.ACTIVE, _S.FAILED)
_CAN_COME_ON: Final = (_S.FROZEN, _S.FAILED)


class Exchanges:
    """Handles the operations ``freeze``, ``thaw``, ``swap``, ``migrate`` and ``acquire``."""

    def __init__(self, core: Core, leases: Leases) -> None:
        self._core = core
        self._leases = leases
        self._results = Results(core)

    # -- start ------------------------------------------------------------------------------------

    def start(self, op: Operation) -> None:
        """Decides who goes off and who comes on, and has them surveyed. Raises refusals that need no survey."""
        processes = [self._core.node.processes[t] for t in op.tree_ids]
        for process in processes:
            if process.state is _S.DEAD:
                raise errors.ProcessExited(
                    f"{process.name} has ended; its log is still there (gpusched logs {process.name})"
                )
        if isinstance(op.params, m.Acquire) and op.caller is not None:
            self._leases.require_few(processes[0], op.caller.connection)
        off, on = self._sides(op, processes)
        for process in off:
            self._leases.require_free(process, op.caller, force=getattr(op.params, "force", False))
        op.exchange = Exchange(
            off=tuple(p.tree_id for p in off), on={p.tree_id: gpu_map for p, gpu_map in on}
        )
        # Also where nothing is to be done: the result says how much VRAM an active process has.
        self._survey(op)

    def _sides(
        self, op: Operation, processes: Sequence[Process]
    ) -> tuple[list[Process], list[tuple[Process, GpuMap]]]:
        """Who must go off and who must come on; whoever is there already is left out."""
        match op.params:
            case m.Freeze():
                return [p for p in processes if p.state in _CAN_GO_OFF], []
            case m.Thaw() | m.Acquire():
                return [], [(p, None) for p in processes if p.state in _CAN_COME_ON]
            case m.Swap():
                off_names, on_names = names(op.params.off), names(op.params.on)
                if clash := set(off_names) & set(on_names):
                    raise errors.InvalidRequest(f"{sorted(clash)[0]} cannot go off and come on")
                return (
                    [p for p in processes if p.name in off_names and p.state in _CAN_GO_OFF],
                    [
                        (p, None)
                        for p in processes
                        if p.name in on_names and p.state in _CAN_COME_ON
                    ],
                )
            case m.Migrate():
                process = processes[0]
                gpu_map = self._gpu_map(process, op.params)
                if gpu_map is None:
                    return [], [(process, None)] if process.state in _CAN_COME_ON else []
                return (
                    [process] if process.state in _CAN_GO_OFF else [],
                    [(process, gpu_map)],
                )
            case _:
                raise errors.InternalError(f"{op.kind} is not an exchange")

    def _gpu_map(self, process: Process, params: m.Migrate) -> GpuMap:
        """The permutation that takes a process to the asked GPUs; None when it is there already."""
        if not self._core.description.can_migrate:
            raise errors.Unsupported(
                f"this driver ({self._core.description.driver_version}) cannot move a process to another GPU; 580 can"
            )
        asked = [params.gpu] if params.gpu is not None else []
        target = self._core.uuids(asked if params.gpus is None else params.gpus)
        if len(target) != len(process.gpus):
            raise errors.InvalidRequest(
                f"{process.name} uses {len(process.gpus)} GPU(s); name as many targets "
                f"(gpusched migrate {process.name} --to A,B)"
            )
        if target == process.gpus:
            return None
        try:
            return permutation(list(self._core.gpus), process.gpus, target)
        except ValueError as error:
            raise errors.InvalidRequest(f"cannot migrate {process.name}: {error}") from None

    def _survey(self, op: Operation) -> None:
        off, on = self._members(op)
        work = self._core.surveyor.survey(op.op_id, off, [p for p, _ in on], self._core.mains())

        async def survey() -> None:
            self._core.post(await work)

        self._core.spawn(survey(), f"survey-{op.op_id}", op.op_id)

    def _members(self, op: Operation) -> tuple[list[Process], list[tuple[Process, GpuMap]]]:
        assert op.exchange is not None
        processes = self._core.node.processes
        return (
            [processes[t] for t in op.exchange.off],
            [(processes[t], gpu_map) for t, gpu_map in op.exchange.on.items()],
        )

    # -- the decision -----------------------------------------------------------------------------

    def surveyed(self, op: Operation, facts: Surveyed) -> None:
        """Decides by the facts: orders, a second survey with victims, or a refusal. Nothing was touched before."""
        if facts.error is not None:
            raise facts.error
        self._note_vram(op, facts)
        off, on = self._members(op)
        if not off and not on:
            # Nothing to record, but for a lease by the clock: it is to survive the daemon.
            lasting = getattr(op.params, "for_s", None) is not None
            end = self._core.finish if lasting else self._core.reply
            end(op, result=self._complete(op))
            return
        force = getattr(op.params, "force", False)
        for process in off:
            admission.require_healthy_tree(process, facts.trees[process.tree_id])
            admission.require_no_obstacle(process, facts.trees[process.tree_id], force=force)
        for process, _ in on:
            if not facts.trees[process.tree_id].members:
                raise errors.ProcessExited(f"{process.name} has ended")
        promises = self._core.promises(except_op=op.op_id, since_s=facts.taken_s)
        admission.require_host_ram(
            off,
            facts,
            promised_bytes=sum(p.host_bytes for p in promises),
            snapshots_bytes=self._core.snapshots_bytes(),
            budget_bytes=self._core.ram_budget_bytes(),
        )
        short = admission.shortages(off, on, facts, promises)
        if short:
            self._make_room(op, off, on, short, facts)
            return
        op.promise = admission.promise_for(off, on, facts)
        op.before = {t: self._core.node.processes[t].state for t in op.tree_ids}
        assert op.exchange is not None
        op.survey_ms = (self._core.monotonic_s - op.begun_s) * 1000
        self._carry_out(op, op.exchange.start())

    def _note_vram(self, op: Operation, facts: Surveyed) -> None:
        """Keeps what the active trees hold: it is what a thaw will need, and what the result says."""
        for tree_id in op.tree_ids:
            process = self._core.node.processes[tree_id]
            if process.state is _S.ACTIVE and (held := admission.held_now(process, facts)):
                gpus = tuple(sorted(held)) if process.adopted else process.gpus
                self._core.put(replace(process, vram=held, gpus=gpus))

    def _make_room(
        self,
        op: Operation,
        off: Sequence[Process],
        on: Sequence[tuple[Process, GpuMap]],
        short: Sequence[Any],
        facts: Surveyed,
    ) -> None:
        """Adds victims to the operation and surveys again; refuses when it was not asked for or none suffice."""
        evict = getattr(op.params, "evict", False)
        victims = (
            choose_victims(self._candidates(op, facts), {s.gpu: s.missing for s in short})
            if evict and not op.evicted
            else None
        )
        if not victims:
            occupants: dict[str, list[str]] = {}
            going = {p.tree_id for p in off}
            for tree_id, held in facts.held.items():
                if tree_id not in going and tree_id in self._core.node.processes:
                    for uuid in held:
                        occupants.setdefault(uuid, []).append(
                            self._core.node.processes[tree_id].name
                        )
            raise admission.too_little_vram(
                [p.name for p, _ in on], short, self._core.gpus, occupants, evict=evict
            )
        assert op.exchange is not None
        op.evicted = victims
        op.tree_ids = (*op.tree_ids, *victims)
        self._core.claim(op, victims)
        op.exchange = Exchange(off=(*op.exchange.off, *victims), on=op.exchange.on)
        self._survey(op)

    def _candidates(self, op: Operation, facts: Surveyed) -> list[Candidate]:
        node = self._core.node
        return [
            Candidate(tree_id=t, last_used_unix_s=p.last_used_unix_s, vram=facts.held.get(t, {}))
            for t, p in node.processes.items()
            if p.state is _S.ACTIVE
            and t not in node.busy
            and node.lease_count(t, self._core.unix_s) == 0
            and (p.evictable or (op.caller is not None and p.uid == op.caller.uid))
        ]

    # -- orders -----------------------------------------------------------------------------------

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
                self._core.post(_refused(op.op_id, order, gone))
                continue
            why = f"{op.kind} {op.op_id}" + (" (taking it back)" if order.is_undo else "")
            self._core.apply(order.tree_id, Trigger(order.move), why)
            living.append(order)
        records = [*self._core.records_of(o.tree_id for o in orders), self.intent_of(op)]
        work = self._perform(op.op_id, living, records)
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
                "before": {t: state.value for t, state in op.before.items()},
            }
        }

    async def _perform(
        self, op_id: str, orders: list[Order], records: list[dict[str, Any]]
    ) -> None:
        begun = self._core.monotonic_s
        try:
            await self._core.ports.journal.append(*records)
        except errors.GpuschedError as error:
            if not all(o.is_undo for o in orders):  # an undo is owed, recorded or not
                for order in orders:
                    self._core.post(_refused(op_id, order, error))
                return
        record_ms = (self._core.monotonic_s - begun) * 1000
        async with asyncio.TaskGroup() as moves:
            for order in orders:
                move = self._move(op_id, order, record_ms)
                moves.create_task(move, name=f"{order.move}-{order.tree_id}")

    async def _move(self, op_id: str, order: Order, record_ms: float) -> None:
        process = self._core.node.processes[order.tree_id]
        assert process.main is not None
        tree = Tree(
            tree_id=process.tree_id,
            main=process.main,
            vram=process.vram,
            oom_scores=process.oom_scores,
            moved=process.moved,
            uid=process.uid,
        )
        begun = self._core.monotonic_s
        report = await self._core.mover.run(tree, order.move, order.gpu_map)
        if isinstance(report.error, errors.ProcessExited):
            # Its end comes first, so that nobody hears of a process in some state that is in truth dead.
            status = await self._core.ports.trees.wait_exit(tree.tree_id, tree.main)
            self._core.post(Exited(tree_id=tree.tree_id, status=status))
        self._core.post(
            MoveEnded(
                op_id=op_id,
                order=order,
                outcome=report.outcome,
                duration_ms=(self._core.monotonic_s - begun) * 1000,
                phases_ms={"record": round(record_ms, 2), **report.phases_ms},
                driver_ms=report.driver_ms,
                oom_scores=report.oom_scores,
                moved=report.moved,
                error=report.error,
                note=report.note,
            )
        )

    # -- how they end -----------------------------------------------------------------------------

    def move_ended(self, op: Operation, ended: MoveEnded) -> None:
        """One order has ended: its process changes state, and the exchange says what is next."""
        assert op.exchange is not None
        tree_id, order = ended.order.tree_id, ended.order
        process = self._core.node.processes[tree_id]
        changes: dict[str, Any] = {}
        if ended.oom_scores is not None:
            changes["oom_scores"] = ended.oom_scores
        if ended.moved is not None:
            changes["moved"] = ended.moved
        if ended.outcome is Outcome.DONE:
            changes["error"] = None
            if order.move is Move.THAW:
                changes |= {
                    "gpus": tuple((order.gpu_map or {}).get(g, g) for g in process.gpus),
                    "vram": admission.need_of([(process, order.gpu_map)]),
                    "last_used_unix_s": self._core.unix_s,
                }
        elif ended.outcome is Outcome.LOST:
            changes["error"] = f"{ended.error}. {ended.note}"
        why = (
            str(ended.error) if ended.error else f"{op.kind} {op.op_id}, {ended.duration_ms:.0f} ms"
        )
        self._core.apply(tree_id, Trigger(ended.outcome), why, **changes)
        self._core.sampler.invalidate()
        if ended.error is not None and op.error is None:
            op.error = ended.error
        op.durations_ms[tree_id] = op.durations_ms.get(tree_id, 0.0) + ended.duration_ms
        op.driver_ms[tree_id] = op.driver_ms.get(tree_id, 0.0) + ended.driver_ms
        phases = op.phases_ms.setdefault(tree_id, {"survey": round(op.survey_ms, 2)})
        phases.update(ended.phases_ms)
        self._tell(op, ended, process)
        nothing_left = ended.order.is_undo and isinstance(ended.error, errors.ProcessExited)
        orders = op.exchange.ended(tree_id, Outcome.DONE if nothing_left else ended.outcome)
        if orders or op.exchange.phase is Phase.ENDED:
            self._carry_out(op, orders)

    def _tell(self, op: Operation, ended: MoveEnded, process: Process) -> None:
        """Counts and announces one ended move."""
        counters, move = self._core.node.counters, ended.order.move
        if ended.outcome is not Outcome.DONE:
            type_ = "lost" if ended.outcome is Outcome.LOST else "rollback"
            self._core.events.emit(type_, process.name, f"{move}: {ended.error}")
        elif ended.order.is_undo:
            self._core.events.emit("rollback", process.name, f"{move} again after a failure")
        elif op.kind != "migrate":
            if move is Move.FREEZE:
                counters.freezes += 1
                counters.freeze_ms += ended.duration_ms
            else:
                counters.thaws += 1
                counters.thaw_ms += ended.duration_ms
                counters.cache_hits += 1
            type_ = "evict" if process.tree_id in op.evicted else move.value
            self._core.events.emit(type_, process.name, duration_ms=ended.duration_ms)

    def _conclude(self, op: Operation) -> None:
        assert op.exchange is not None
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
        self._core.finish(op, error=self._results.failure(op))

    def _complete(self, op: Operation) -> dict[str, Any]:
        """The result of an operation that reached its goal; an acquire gets its lease here."""
        result = self._results.of(op)
        if isinstance(op.params, m.Acquire):
            process = self._core.named(op.params.name)
            result |= self._leases.grant(process, op.caller, op.params.for_s)
        return result


def _refused(op_id: str, order: Order, error: errors.GpuschedError) -> MoveEnded:
    """The end of an order that was never begun."""
    return MoveEnded(
        op_id=op_id, order=order, outcome=Outcome.ROLLED_BACK, duration_ms=0.0, error=error
    )
