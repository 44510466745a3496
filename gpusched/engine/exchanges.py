"""Freeze, thaw, swap, migrate, acquire, hibernate: everything that is an exchange of trees, from request to decision.

The course of one, in events: start (who goes where) -> Surveyed (facts) -> a decision -> orders, each ended by
MoveEnded -> more orders or the end. ``domain/exchange.py`` knows the order of moves, ``admission.py`` and
``disk_admission.py`` the conditions; here they meet the node. What follows the decision is in ``orders.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from gpusched import errors
from gpusched.domain.eviction import Cold, DiskPolicy, LeastRecentlyUsed
from gpusched.domain.exchange import Exchange, GpuMap
from gpusched.domain.moves import Move
from gpusched.domain.placement import permutation
from gpusched.domain.states import ProcState
from gpusched.engine import admission, disk_admission, kept
from gpusched.engine.ahead import AheadOfNeed
from gpusched.engine.core import Core
from gpusched.engine.events import Surveyed
from gpusched.engine.gpu_room import GpuRoom
from gpusched.engine.leases import Leases
from gpusched.engine.model import Operation, Process
from gpusched.engine.orders import Orders
from gpusched.engine.results import names
from gpusched.protocol import messages as m

_S = ProcState
#: Where an exchange may begin; the failed are tried again, since every step asks the driver first.
_CAN_GO_OFF: Final = (_S.ACTIVE, _S.FAILED)
_CAN_COME_ON: Final = (_S.FROZEN, _S.HIBERNATED, _S.FAILED)


class Exchanges:
    """Decides freeze, thaw, swap, migrate, acquire and hibernate, and each of the two exchanges of a fork."""

    def __init__(
        self,
        core: Core,
        leases: Leases,
        orders: Orders,
        to_disk: DiskPolicy | None = None,
    ) -> None:
        self._core = core
        self._leases = leases
        self._orders = orders
        self._to_disk = to_disk or LeastRecentlyUsed()
        self.ahead = AheadOfNeed(core, self._to_disk, self._cold)
        #: Operations that need room in RAM, for which somebody is on the way to disk already.
        self._parked: list[str] = []
        self._gpu_room = GpuRoom(core, self.survey)

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
        down = self._down(op, processes)
        for process in (*off, *down):
            self._leases.require_free(process, op.caller, force=getattr(op.params, "force", False))
        move = Move.SAVE if isinstance(op.params, m.Fork) else Move.HIBERNATE
        op.keep_context = getattr(op.params, "keep_context", False)
        op.exchange = Exchange(
            off=tuple(p.tree_id for p in off),
            down={p.tree_id: move for p in down},
            up=tuple(p.tree_id for p, _ in on if p.state is _S.HIBERNATED),
            on={p.tree_id: gpu_map for p, gpu_map in on},
        )
        # Also where nothing is to be done: the result says how much VRAM an active process has.
        self.survey(op)

    def _sides(
        self, op: Operation, processes: Sequence[Process]
    ) -> tuple[list[Process], list[tuple[Process, GpuMap]]]:
        """Who must go off and who must come on; whoever is there already is left out."""
        match op.params:
            case m.Freeze() if op.caller is None:  # of our own: only for what a freeze has left
                return [], []
            case m.Freeze() | m.Hibernate():
                return [p for p in processes if p.state in _CAN_GO_OFF], []
            case m.Fork():
                off = [p for p in processes if p.state in _CAN_GO_OFF]
                return off, [(p, None) for p in off]
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

    def _down(self, op: Operation, processes: Sequence[Process]) -> list[Process]:
        """Who is to be saved to disk. Raises Unsupported for what never can be."""
        if not isinstance(op.params, m.Hibernate | m.Fork):
            return []
        down = [p for p in processes if p.state in (*_CAN_GO_OFF, _S.FROZEN)]
        for process in down:
            disk_admission.require_possible(op.kind, process, self._core.ports.disk.why_not())
        return down

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

    def survey(self, op: Operation) -> None:
        off, on = self._members(op)
        work = self._core.surveyor.survey(
            op.op_id, off, [p for p, _ in on], self._to_be_saved(op), self._core.mains()
        )

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

    def _to_be_saved(self, op: Operation) -> list[Process]:
        assert op.exchange is not None
        trees = (*op.exchange.room, *op.exchange.down)
        return [self._core.node.processes[t] for t in trees]

    # -- the decision -----------------------------------------------------------------------------

    def surveyed(self, op: Operation, facts: Surveyed) -> None:
        """Decides by the facts: orders, a second survey with victims, or a refusal. Nothing was touched before."""
        if facts.error is not None:
            raise facts.error
        self._note_vram(op, facts)
        processes = self._core.node.processes
        op.kept_bytes |= {t: sum(kept.of(processes[t], facts).values()) for t in op.tree_ids}
        assert op.exchange is not None
        op.exchange = replace(op.exchange, deepen=kept.must_go(op, processes, facts))
        off, on = self._members(op)
        if not op.exchange.trees:
            self._orders.nothing_to_do(op)
            return
        force = getattr(op.params, "force", False)
        for process in off:
            admission.require_healthy_tree(process, facts.trees[process.tree_id])
            admission.require_no_obstacle(process, facts.trees[process.tree_id], force=force)
        for process, _ in on:
            if process.main is None:
                disk_admission.require_unchanged(process, facts.changes[process.tree_id])
            elif not facts.trees[process.tree_id].members:
                raise errors.ProcessExited(f"{process.name} has ended")
        promises = self._core.promises(except_op=op.op_id, since_s=facts.taken_s)
        if self._passes_over(op, facts):
            return
        saved = self._to_be_saved(op)
        disk_admission.require_disk(
            saved,
            facts,
            self._core.ports.disk.room(),
            promised_bytes=sum(p.disk_bytes for p in promises),
            budget_bytes=self._core.limits.disk_budget_bytes,
        )
        if not self._has_host_ram(op, off, [p for p, _ in on], facts):
            return
        planned = [
            (replace(p, vram=off[0].vram if off else saved[0].vram), g) for p, g in op.planned
        ]
        if short := self._gpu_room.shortage(op, off, [*on, *planned], facts, promises):
            self._gpu_room.make(op, off, on, short, facts)
            return
        disk_bytes = disk_admission.need_of(saved, facts)
        op.promise = admission.promise_for(
            off, on, facts, disk_bytes, self._gpu_room.stays(op, off, facts)
        )
        op.before = {t: self._core.node.processes[t].state for t in op.tree_ids} | op.before
        op.survey_ms = (self._core.monotonic_s - op.begun_s) * 1000
        self._orders.begin(op)

    def _has_host_ram(
        self, op: Operation, off: Sequence[Process], on: Sequence[Process], facts: Surveyed
    ) -> bool:
        """Whether what goes off and what comes from disk fits into host RAM; if not, cold trees are sent to disk first.

        Raises InsufficientHostMemory when that is not possible.
        """
        assert op.exchange is not None
        promises = self._core.promises(except_op=op.op_id, since_s=facts.taken_s)
        self._require_quota(op, off, facts)
        leaving = [self._core.node.processes[t] for t in op.exchange.room]
        shortage = admission.host_ram_shortage(
            off,
            [p for p in on if p.main is None],
            facts,
            promised_bytes=sum(p.host_bytes for p in promises),
            snapshots_bytes=self._core.snapshots_bytes(),
            leaving_bytes=sum(p.vram_bytes for p in leaving),
            budget_bytes=self._core.ram_budget_bytes(),
        )
        if shortage is None:
            return True
        if self.ahead.is_at_work:
            self._parked.append(op.op_id)
            return False
        victims = self._to_disk.choose(self._cold(op.unmovable), shortage.missing_bytes)
        if not victims:
            raise shortage.error(tuple(op.unmovable.values()))
        op.tree_ids = (*op.tree_ids, *victims)
        self._core.claim(op, victims)
        op.exchange = replace(op.exchange, room=(*op.exchange.room, *victims))
        self.survey(op)
        return False

    def _require_quota(self, op: Operation, off: Sequence[Process], facts: Surveyed) -> None:
        """Charges what will stay in RAM; not who is in the way of somebody else."""
        quota = self._core.limits.user_ram_budget_bytes
        if quota is None:
            return
        assert op.exchange is not None
        node, on = self._core.node, op.exchange.on.keys()
        gone = on | {t for t, move in op.exchange.down.items() if move is Move.HIBERNATE}
        uid = op.caller.uid if op.caller else None
        charged = [
            p
            for p in off
            if p.tree_id not in gone and (p.tree_id not in op.evicted or p.uid == uid)
        ]
        admitted = [o for o in node.operations.values() if o is not op and o.promise is not None]
        coming = {t for o in admitted if o.exchange is not None for t in o.exchange.off}
        in_ram = ({p.tree_id for p in self._core.in_host_ram()} | coming) - on
        admission.require_quota(charged, [node.processes[t] for t in in_ram], facts, quota)

    def resume(self) -> None:
        """What waited for room looks again, when that is there or will not come."""
        self._gpu_room.resume()
        if self._parked and not self.ahead.is_at_work:
            parked, self._parked = self._parked, []
            for op_id in parked:
                if op_id in self._core.node.operations:
                    self.survey(self._core.node.operations[op_id])

    def _cold(self, unmovable: Collection[str]) -> list[Cold]:
        """Frozen trees that may go to disk to make room."""
        node = self._core.node
        if self._core.ports.disk.why_not():
            return []
        return [
            Cold(tree_id=t, last_used_unix_s=p.last_used_unix_s, ram_bytes=p.vram_bytes)
            for t, p in node.processes.items()
            if p.state is _S.FROZEN
            and p.isolated
            and t not in node.busy
            and t not in unmovable
            and node.lease_count(t, self._core.unix_s) == 0
        ]

    def _hold_if_shared(
        self, op: Operation, source: Process, facts: Surveyed, *, force: bool
    ) -> None:
        """Copies must come back to open files as they were saved: the source waits until they have."""
        assert op.exchange is not None
        disk_admission.require_unshared(source, facts, force=force)
        if facts.disk[source.tree_id].shared_files:
            op.exchange = replace(op.exchange, on={})

    def _passes_over(self, op: Operation, facts: Surveyed) -> bool:
        """Lets go of those that were to make room in RAM and cannot be saved; whether there were any.

        For the trees that the request is about, an obstacle is an error (raised).
        """
        assert op.exchange is not None
        for tree_id in op.exchange.down:
            process = self._core.node.processes[tree_id]
            force = getattr(op.params, "force", False)
            disk_admission.require_no_obstacle(process, facts, force=force)
            if isinstance(op.params, m.Fork):
                self._hold_if_shared(op, process, facts, force=force)
        stuck = [t for t in op.exchange.room if facts.disk[t].obstacles]
        if not stuck:
            return False
        for tree_id in stuck:
            process = self._core.node.processes[tree_id]
            op.unmovable[tree_id] = f"{process.name}: {facts.disk[tree_id].obstacles[0].message}"
            del self._core.node.busy[tree_id]
        op.tree_ids = tuple(t for t in op.tree_ids if t not in stuck)
        op.exchange = replace(
            op.exchange,
            room=tuple(t for t in op.exchange.room if t not in stuck),
            deepen=tuple(t for t in op.exchange.deepen if t not in stuck),
        )
        self.survey(op)
        return True

    def _note_vram(self, op: Operation, facts: Surveyed) -> None:
        """Keeps what the active trees hold: it is what a thaw will need, and what the result says."""
        for tree_id in op.tree_ids:
            process = self._core.node.processes[tree_id]
            if process.state is _S.ACTIVE and (held := admission.held_now(process, facts)):
                gpus = tuple(sorted(held)) if process.adopted else process.gpus
                self._core.put(replace(process, vram=held, gpus=gpus))
