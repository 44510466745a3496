"""How managed processes end: killed on request, or by themselves."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any, Final

from gpusched import errors
from gpusched.domain.states import ProcState, Trigger
from gpusched.engine.core import Core
from gpusched.engine.events import Exited, Killed
from gpusched.engine.leases import Leases
from gpusched.engine.model import Operation, Process
from gpusched.ports import ExitStatus, Member

log = logging.getLogger(__name__)

#: After SIGKILL a process may still be in the kernel: a driver call, a dump of core.
KILL_TIMEOUT_S: Final = 60.0
_S = ProcState


class Endings:
    """Handles the operation ``kill``, and the exit nobody asked for."""

    def __init__(self, core: Core, leases: Leases) -> None:
        self._core = core
        self._leases = leases

    def kill(self, op: Operation) -> None:
        """Ends a tree, or forgets one that has ended already."""
        process = self._core.node.processes[op.tree_ids[0]]
        self._leases.require_free(process, op.caller, force=op.params.force)
        if process.state is _S.DEAD or (process.main is None and process.on_disk is None):
            self.killed(op, Killed(op_id=op.op_id))
            return
        op.before = {process.tree_id: process.state}
        self._core.spawn(self._end(op, process), f"kill-{process.name}", op.op_id)

    async def _end(self, op: Operation, process: Process) -> None:
        try:
            if process.main is not None:
                await self._terminate(process)
            # Before its record: an image without one would be woken again.
            if process.on_disk is not None:
                await self._core.ports.disk.delete(process.on_disk.image)
        except errors.GpuschedError as error:
            self._core.post(Killed(op_id=op.op_id, error=error))
        else:
            self._core.post(Killed(op_id=op.op_id))

    async def _terminate(self, process: Process) -> None:
        """SIGTERM and a grace period, then SIGKILL; at once when nobody could answer a SIGTERM."""
        trees, clock = self._core.ports.trees, self._core.ports.clock
        assert process.main is not None
        ours = await self._ours(process)
        if process.state is _S.ACTIVE and not all(x.stopped for x in ours):
            await trees.signal(ours, signal.SIGTERM)
            deadline = clock.monotonic_s() + self._core.limits.kill_grace_s
            await self._until_gone(process, deadline)
        deadline = clock.monotonic_s() + KILL_TIMEOUT_S
        while ours := await self._ours(process):
            await trees.signal(ours, signal.SIGKILL)
            await self._until_gone(process, min(deadline, clock.monotonic_s() + 1.0))
            if clock.monotonic_s() > deadline:
                raise errors.DriverError(
                    f"{process.name} did not end {KILL_TIMEOUT_S:.0f} s after SIGKILL (pids "
                    f"{[x.pid for x in ours]}): the kernel still holds it, see dmesg"
                )
        if await trees.is_alive(process.main):
            raise errors.PermissionDenied(
                f"pid {process.main.pid} of {process.name} belongs to another user now; gpusched does not end "
                "other users' processes"
            )
        await trees.wait_exit(process.tree_id, process.main)

    async def _until_gone(self, process: Process, deadline_s: float) -> None:
        pause = 0.002
        while await self._ours(process) and self._core.monotonic_s < deadline_s:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)

    async def _ours(self, process: Process) -> list[Member]:
        """The members that the owner may signal: a set-uid descendant of somebody else is not ours to end."""
        assert process.main is not None
        members = await self._core.ports.trees.members(process.tree_id, process.main)
        return [x for x in members if process.uid in (0, x.ruid)]

    def killed(self, op: Operation, event: Killed) -> None:
        """A kill has ended; the entry goes with the process."""
        if event.error is not None:
            self._core.finish(op, error=event.error)
            return
        tree_id = op.tree_ids[0]
        process = self._core.node.processes[tree_id]
        self._core.remove(tree_id)
        if process.on_disk is not None:
            self._core.node.images.discard(process.on_disk.image)
        self._core.sampler.invalidate()
        self._core.spawn(self._core.ports.trees.forget(tree_id), f"forget-{tree_id}")
        self._core.events.emit("kill", process.name)
        self._core.finish(op, result={"name": process.name})

    def exited(self, event: Exited) -> None:
        """The main process of a tree has ended by itself, or by somebody's signal."""
        process = self._core.node.processes.get(event.tree_id)
        if process is None or process.state is _S.DEAD or process.main != event.main:
            return  # it was killed through us, or is on disk by now
        to_or_from_disk = process.state is _S.HIBERNATING or (
            process.state is _S.THAWING and process.on_disk is not None
        )
        if to_or_from_disk and not event.seen_by_move:
            return  # the move finds out by itself, and knows whether the end was meant; it is watched again after
        how = describe_exit(event.status)
        if process.on_disk is not None and process.state is _S.FROZEN:
            self._back_on_disk(process, how)
            return
        process = self._core.apply(
            event.tree_id, Trigger.EXITED, how, exit=event.status, oom_scores={}, timed_leases=()
        )
        self._core.drop_leases(lambda tree_id, _: tree_id == event.tree_id)
        self._core.sampler.invalidate()
        self._core.events.emit("exit", process.name, how)
        self._core.spawn(self._record_exit(process), f"record-exit-{process.name}")

    def _back_on_disk(self, process: Process, how: str) -> None:
        """What came from disk, and ended before it ran, is what its image says."""
        lost: dict[str, Any] = {"main": None, "oom_scores": {}, "moved": {}}
        self._core.apply(process.tree_id, Trigger.FOUND_HIBERNATED, how, **lost)
        self._core.sampler.invalidate()
        self._core.events.emit("exit", process.name, f"{how} before it ran; its image is kept")
        self._core.spawn(self._record_exit(process), f"record-exit-{process.name}")
        self._core.spawn(self._core.ports.trees.forget(process.tree_id), f"forget-{process.name}")

    async def _record_exit(self, process: Process) -> None:
        records = self._core.records_of([process.tree_id])
        try:
            await self._core.ports.journal.append(*records)
        except errors.GpuschedError as error:
            log.warning("the end of %s is not in the journal: %s", process.name, error)
            self._core.journal_is_behind = True


def describe_exit(status: ExitStatus) -> str:
    if status.signal is not None:
        try:
            return f"ended by {signal.Signals(status.signal).name}"
        except ValueError:
            return f"ended by signal {status.signal}"
    return "ended" if status.code is None else f"exited with {status.code}"
