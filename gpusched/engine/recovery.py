"""After a restart: what the journal remembers against what is there, before the first request is served.

Covers: finding every tree that lives, its true state, and finishing or undoing what was half done. Nothing is acted
on before everything has been looked at. Does not cover: anything while the daemon runs (``exchanges.py``).

For each process of the journal, one of:
1. It lives, and the contents of all its CUDA processes are off the GPU: frozen (what is left of the freeze is done).
2. It lives, and none is locked or off the GPU: active.
3. It lives, half-way: taken back to active when its VRAM fits, else on to frozen.
4. It is gone: dead, with the exit status that its supervisor wrote.
An exchange that had not ended is then undone whole, unless it had come to its goal.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from gpusched import errors
from gpusched.domain.capacity import add
from gpusched.domain.moves import Move, Outcome
from gpusched.domain.states import MOVING, ProcState, Trigger
from gpusched.engine.disk_recovery import DiskRecovery
from gpusched.engine.model import Process, Tree, from_record
from gpusched.engine.moves import Mover
from gpusched.engine.survey import take_sample
from gpusched.ports import (
    OFF_GPU,
    Clock,
    Disk,
    Driver,
    DriverState,
    Identity,
    Launch,
    Member,
    Trees,
    Usage,
    Users,
)

log = logging.getLogger(__name__)

_S = ProcState
_NOT_TO_BE_MOVED = (_S.DEAD, _S.FAILED, _S.HIBERNATED)
#: Where a process without CUDA state stands still because we stopped it.
_AT_REST = (_S.FROZEN, _S.FREEZING, _S.THAWING, _S.HIBERNATING)


@dataclass(slots=True, kw_only=True)
class Remembered:
    """What a journal says: the last record of each process, and the operations that had not ended."""

    processes: dict[str, Process] = field(default_factory=dict)
    operations: dict[str, dict[str, Any]] = field(default_factory=dict)


def replay(records: Iterable[Mapping[str, Any]]) -> Remembered:
    """Reads records in order; later ones win. A record that does not fit is passed over with a warning."""
    memory = Remembered()
    for record in records:
        try:
            if "proc" in record:
                process = from_record(record["proc"])
                memory.processes[process.tree_id] = process
            elif "forget" in record:
                memory.processes.pop(record["forget"], None)
            elif "op" in record:
                memory.operations[record["op"]["op_id"]] = record["op"]
            elif "op_end" in record:
                memory.operations.pop(record["op_end"], None)
        except (msgspec.ValidationError, KeyError, TypeError) as error:
            log.warning("journal record passed over: %s", error)
    return memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """One process as it was found; without members there is nothing to bring to a settled state."""

    process: Process
    members: Sequence[Member] | None = None
    states: Mapping[int, DriverState] = field(default_factory=dict)


class Recovery:
    """One pass, before the engine runs."""

    def __init__(
        self, driver: Driver, trees: Trees, clock: Clock, users: Users, mover: Mover, disk: Disk
    ) -> None:
        self._driver = driver
        self._trees = trees
        self._clock = clock
        self._users = users
        self._mover = mover
        #: What was found and done, one line each, for the log and the first events.
        self.notes: list[str] = []
        self._disk = DiskRecovery(disk, trees, clock, self._note)

    async def recover(self, memory: Remembered) -> list[Process]:
        """The processes as they truly are. Blocks for as long as half-done moves take to finish or undo."""
        await self._disk.begin()
        await self._add_leftovers(memory)
        remembered = self._disk.unknown(memory.processes)
        memory.processes |= {p.tree_id: p for p in remembered}
        # At the same time: one that does not settle must not hold up the others. Moves come one after another.
        found = await asyncio.gather(*(self._look(p) for p in memory.processes.values()))
        recovered = [
            await self._reconcile(look.process, look.members, look.states)
            if look.members is not None
            else look.process
            for look in found
            if look is not None
        ]
        by_id = {p.tree_id: p for p in recovered}
        for operation in memory.operations.values():
            await self._undo_operation(operation, by_id)
            await self._note_gpus(operation, by_id)
        # What runs is not any more what its image holds.
        for process in by_id.values():
            if process.state is _S.ACTIVE and process.on_disk is not None:
                by_id[process.tree_id] = replace(process, on_disk=None)
        await self._disk.finish(by_id)
        await self._trees.forget_all_but(by_id)
        return list(by_id.values())

    async def _look(self, process: Process) -> _Look | None:
        """What is there of one process; None for one that never began. Acts on nothing."""
        if process.state is _S.DEAD:
            return _Look(process=process)
        settled, is_settled = await self._disk.settle(process)
        if settled is None or is_settled:
            return _Look(process=settled) if settled is not None else None
        process = settled
        if process.main is None or not await self._trees.is_alive(process.main):
            gone = await self._after_end(process)
            return _Look(process=gone) if gone is not None else None
        if process.state is _S.STARTING:  # the daemon died while it adopted it
            process = self._begun(process, process.main)
        try:
            members, states = await self._mover.settle(Tree.of(process))
        except errors.GpuschedError as error:
            return _Look(process=self._broken(process, f"cannot be looked at: {error}"))
        return _Look(process=process, members=members, states=states)

    async def _add_leftovers(self, memory: Remembered) -> None:
        """Trees that live by their supervisors' own records: all of them when the journal is lost."""
        for tree_id, launch, main in await self._trees.leftovers():
            known = memory.processes.get(tree_id)
            if known is None:
                memory.processes[tree_id] = await self._from_launch(tree_id, launch, main)
            elif known.main is None and known.state is _S.STARTING:
                # The daemon died between the intent to run it and hearing its pid.
                memory.processes[tree_id] = self._begun(known, main)

    def _begun(self, process: Process, main: Identity) -> Process:
        self._note(process, f"had been started (pid {main.pid})")
        return process.after(Trigger.STARTED, "found at recovery", self._clock.unix_s(), main=main)

    async def _from_launch(self, tree_id: str, launch: Launch, main: Identity) -> Process:
        user = await self._users.lookup(launch.uid, launch.gid)
        now = self._clock.unix_s()
        visible = launch.env.get("CUDA_VISIBLE_DEVICES", "")
        process = Process(
            tree_id=tree_id,
            name=launch.name,
            uid=launch.uid,
            user=user.name,
            gpus=tuple(visible.split(",")) if visible else (),
            started_unix_s=now,
            last_used_unix_s=now,
            state=_S.ACTIVE,
            main=main,
            adopted=not launch.argv,
            isolated=launch.isolated,
            stop=launch.stop,
            log_path=launch.log_path if launch.argv else None,
        )
        self._note(process, "is not in the journal; taken from its supervisor's record")
        return process

    async def _after_end(self, process: Process) -> Process | None:
        """A process that is not there any more: dead with its status, or never begun (None)."""
        status = await self._trees.exit_status(process.tree_id)
        if process.main is not None:
            # It may have ended this instant, and its supervisor is about to write how.
            status = await self._trees.wait_exit(process.tree_id, process.main)
        elif status is None:
            self._note(process, "had not been started; its name is free")
            await self._trees.forget(process.tree_id)
            return None
        # What ended by itself had run, whatever the last daemon knew.
        if status.code is None:
            on_disk = self._disk.after_end(process)
            if on_disk is not None:
                await self._trees.forget(process.tree_id)
                return on_disk
        self._note(process, "ended while no daemon ran")
        return process.after(
            Trigger.EXITED,
            "while no daemon ran",
            self._clock.unix_s(),
            exit=status,
            oom_scores={},
            timed_leases=(),
        )

    async def _reconcile(
        self, process: Process, members: Sequence[Member], states: Mapping[int, DriverState]
    ) -> Process:
        """Brings one live tree to a settled state; cases 1 to 3 above, and the broken."""
        mute = [m for m in members if m.stopped and states.get(m.pid) is DriverState.UNKNOWN]
        if mute:  # a process that is stopped with its VRAM cannot be asked
            if process.state is _S.ACTIVE:
                return process  # no move was under way: its owner stopped it
            await self._trees.signal(mute, signal.SIGCONT)
            try:
                members, states = await self._mover.settle(Tree.of(process))
            except errors.GpuschedError as error:
                return self._broken(process, f"cannot be looked at: {error}")
        found = {s for s in states.values() if s is not DriverState.NONE}
        stopped = bool(members) and all(m.stopped for m in members)
        any_stopped = any(m.stopped for m in members)
        was = process.state
        if found & {DriverState.FAILED, DriverState.UNKNOWN}:
            return self._broken(process, "was given up by the driver; kill it")
        stopped_only = not found and stopped and was in _AT_REST
        if (found and found <= OFF_GPU) or stopped_only:
            move, wanted = Move.FREEZE, _S.FROZEN
        elif found <= {DriverState.RUNNING}:
            if was is _S.ACTIVE:
                return process
            move, wanted = Move.THAW, _S.ACTIVE
        else:
            # What is only locked has its VRAM still.
            fits = not found & OFF_GPU or await self._fits(process)
            move, wanted = (Move.THAW, _S.ACTIVE) if fits else (Move.FREEZE, _S.FROZEN)
        # A context that is on the GPU may stay there: whoever needs the room has it taken off. Of a freeze in the
        # middle nobody knows whether it was to stay; nothing does, where that needs no process to be continued.
        keep = bool(found) and found <= OFF_GPU and (was is not _S.FREEZING or any_stopped)
        return await self._move(process, move, wanted, f"was {was}", keep_context=keep)

    async def _move(
        self,
        process: Process,
        move: Move,
        wanted: ProcState,
        why: str,
        *,
        keep_context: bool = False,
    ) -> Process:
        """Performs or finishes ``move``; the process after it, whichever way it ended."""
        report = await self._mover.run(Tree.of(process), move, keep_context=keep_context)
        now = self._clock.unix_s()
        changes: dict[str, Any] = {"moved": report.moved, "kept": report.kept}
        if report.oom_scores is not None:
            changes["oom_scores"] = report.oom_scores
        found = {_S.FROZEN: Trigger.FOUND_FROZEN, _S.ACTIVE: Trigger.FOUND_ACTIVE}
        if report.outcome is Outcome.DONE:
            if process.state is not wanted:
                self._note(process, f"{why}; is {wanted} now")
            return process.after(found[wanted], f"recovery: {why}", now, error=None, **changes)
        if report.outcome is Outcome.ROLLED_BACK:
            other = _S.ACTIVE if wanted is _S.FROZEN else _S.FROZEN
            self._note(process, f"{why}; could not become {wanted} ({report.error}), is {other}")
            return process.after(found[other], f"recovery: {report.error}", now, **changes)
        return self._broken(
            replace(process, **changes),
            f"{why}; could not be brought back: {report.error}. {report.note}",
        )

    async def _fits(self, process: Process) -> bool:
        """Whether all of a tree's VRAM has room, beside what it holds of that already."""
        usage: Usage = await self._driver.usage()
        assert process.main is not None
        members = await self._trees.members(process.tree_id, process.main)
        own = add(*(usage.processes.get(m.pid, {}) for m in members))
        return all(
            usage.gpus[uuid].free_bytes + own.get(uuid, 0) >= size
            for uuid, size in process.vram.items()
            if uuid in usage.gpus
        )

    async def _undo_operation(
        self, operation: Mapping[str, Any], processes: dict[str, Process]
    ) -> None:
        """Takes back an exchange that the last daemon did not end, unless it had reached its goal."""
        there = [t for t in (*operation["off"], *operation["on"]) if t in processes]
        goal = dict.fromkeys(operation["off"], _S.FROZEN)
        goal |= dict.fromkeys(operation.get("down", ()), _S.HIBERNATED)
        goal |= dict.fromkeys(operation["on"], _S.ACTIVE)
        if all(processes[t].state is goal[t] for t in there):
            return
        before = {t: _S(operation["before"].get(t, _S.ACTIVE)) for t in there}
        # First off the GPU what was not on it before, then on what was: the room is needed.
        for wanted, move in ((_S.FROZEN, Move.FREEZE), (_S.ACTIVE, Move.THAW)):
            for tree_id in dict.fromkeys(there):
                process = processes[tree_id]
                if process.state in MOVING or process.state in _NOT_TO_BE_MOVED:
                    continue
                if before[tree_id] is not wanted or process.state is wanted:
                    continue
                if move is Move.THAW and not await self._fits(process):
                    self._note(
                        process,
                        f"stays {process.state}: there is no room to take {operation['kind']} back",
                    )
                    continue
                processes[tree_id] = await self._move(
                    process, move, wanted, f"taking back {operation['kind']}"
                )

    async def _note_gpus(self, operation: Mapping[str, Any], processes: dict[str, Process]) -> None:
        """Where a migration that was cut short has really left its process: the last record may say otherwise."""
        there = [processes[t] for t in operation["on"] if t in processes]
        active = {p.tree_id: p.main for p in there if p.state is _S.ACTIVE and p.main is not None}
        try:
            sample = await take_sample(self._driver, self._trees, self._clock, active)
        except errors.GpuschedError as error:
            log.warning("no VRAM sample: %s", error)
            return
        for tree_id, held in sample.held.items():
            process = processes[tree_id]
            if len(held) == len(process.gpus) and set(held) != set(process.gpus):
                self._note(process, f"is on {', '.join(sorted(held))} now")
                processes[tree_id] = replace(process, gpus=tuple(sorted(held)), vram=held)

    def _broken(self, process: Process, text: str) -> Process:
        self._note(process, text)
        return process.after(Trigger.FOUND_BROKEN, "recovery", self._clock.unix_s(), error=text)

    def _note(self, process: Process, text: str) -> None:
        self.notes.append(f"{process.name} {text}")
        log.warning("recovery process=%s %s", process.name, text)
