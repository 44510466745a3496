"""Performing one move between host RAM and disk on one tree: the steps of ``domain/moves.py`` through the ports.

The sibling of ``moves.py``, with the same contract: a failing step is undone with those before it, and the report
says how it ended. The last copy rule is here in three places: the original ends only after ``save`` has committed;
what fails half-way is taken for what it was before; nothing here deletes a committed image but an undo of its own save.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gpusched import errors
from gpusched.domain.moves import STEPS, Move, Op, Outcome, undo_after
from gpusched.engine.events import DiskReport
from gpusched.ports import Clock, Disk, Identity, Revival, Trees

log = logging.getLogger(__name__)

#: How long processes may take to stand still again after a save that failed.
STOP_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTask:
    """What a move between RAM and disk needs to know of its tree."""

    tree_id: str
    main: Identity | None
    image: str
    record: Mapping[str, Any]
    revival: Revival | None = None


@dataclass(slots=True, kw_only=True)
class DiskOutcome:
    """How a move ended and what it learned."""

    outcome: Outcome
    report: DiskReport = field(default_factory=DiskReport)
    phases_ms: dict[str, float] = field(default_factory=dict)
    error: errors.GpuschedError | None = None
    note: str = ""


class DiskMover:
    """Performs moves. Holds no state between them; one instance serves all trees."""

    def __init__(self, disk: Disk, trees: Trees, clock: Clock) -> None:
        self._disk = disk
        self._trees = trees
        self._clock = clock

    async def run(self, task: DiskTask, move: Move) -> DiskOutcome:
        """Performs ``move``. Never raises: the outcome says how it ended.

        DONE: the tree is where ``move`` leads. ROLLED_BACK: it is where it was, or has ended (``error`` is
        ProcessExited). LOST: a tree that was to stay cannot be made to stand still again.
        """
        work = _Work(self._disk, self._trees, self._clock, task)
        for number, step in enumerate(STEPS[move]):
            error = await work.perform(step.do)
            if error is None:
                continue
            if step.undo is None:
                log.warning("%s of %s: %s", step.do, task.tree_id, error)
                return work.ended(Outcome.DONE, note=str(error))
            log.warning("move failed move=%s tree=%s error=%s", move, task.tree_id, error)
            undone = [await work.perform(op) for op in undo_after(move, number)]
            failed = next((e for e in undone if e is not None), None)
            if isinstance(failed, errors.ProcessExited):
                error, failed = failed, None
            if (
                failed is None or move is Move.WAKE
            ):  # the image is whole, whatever became of the rest
                return work.ended(Outcome.ROLLED_BACK, error)
            return work.ended(Outcome.LOST, error, f"taking it back failed too: {failed}")
        return work.ended(Outcome.DONE)


class _Work:
    """One pass over one tree."""

    def __init__(self, disk: Disk, trees: Trees, clock: Clock, task: DiskTask) -> None:
        self._disk = disk
        self._trees = trees
        self._clock = clock
        self._task = task
        self._report = DiskReport(image=task.image)
        self._phases_ms: dict[str, float] = {}
        self._steps: dict[Op, Callable[[], Awaitable[None]]] = {
            Op.SAVE: self._save,
            Op.DISCARD: self._discard,
            Op.REVIVE: self._revive,
            Op.END: self._end,
        }

    def ended(
        self, outcome: Outcome, error: errors.GpuschedError | None = None, note: str = ""
    ) -> DiskOutcome:
        return DiskOutcome(
            outcome=outcome,
            report=self._report,
            phases_ms=self._phases_ms,
            error=error,
            note=note,
        )

    async def perform(self, op: Op) -> errors.GpuschedError | None:
        """One step; what it raised is returned."""
        started = self._clock.monotonic_s()
        try:
            await self._steps[op]()
        except errors.GpuschedError as error:
            return error
        finally:
            spent = (self._clock.monotonic_s() - started) * 1000
            self._phases_ms[op] = round(self._phases_ms.get(op, 0.0) + spent, 2)
        return None

    # -- the steps --------------------------------------------------------------------------------

    async def _save(self) -> None:
        task = self._task
        assert task.main is not None
        members = await self._trees.members(task.tree_id, task.main)
        if not members:
            raise errors.ProcessExited("the process ended in the middle of the operation")
        if running := [m.pid for m in members if not m.stopped]:
            raise errors.DriverError(
                f"pids {running} run although the process is frozen; somebody has continued them",
                {"pids": running},
            )
        saved = await self._disk.save(task.image, task.tree_id, task.main, members, task.record)
        self._report = DiskReport(
            image=task.image, image_bytes=saved.size_bytes, main=task.main, pids=saved.pids
        )

    async def _discard(self) -> None:
        """No image of this save, and everybody stopped: where CRIU dies, it leaves what it had hold of running."""
        task = self._task
        assert task.main is not None
        await self._disk.delete(task.image)
        deadline = self._clock.monotonic_s() + STOP_TIMEOUT_S
        while True:
            members = await self._trees.members(task.tree_id, task.main)
            if not members:
                raise errors.ProcessExited("the process ended in the middle of the operation")
            running = [m for m in members if not m.stopped]
            if not running:
                return
            if self._clock.monotonic_s() > deadline:
                pids = [m.pid for m in running]
                raise errors.DriverError(
                    f"pids {pids} did not stop within {STOP_TIMEOUT_S:.0f} s", {"pids": pids}
                )
            await self._trees.signal(running, signal.SIGSTOP)
            await asyncio.sleep(0.01)

    async def _revive(self) -> None:
        task = self._task
        assert task.revival is not None
        woken = await self._disk.wake(task.image, task.revival)
        self._report = DiskReport(image=task.image, main=woken.main, pids=woken.pids)
        members = await self._trees.members(task.tree_id, woken.main)
        if not members:
            raise errors.CriuError(f"the processes of image {task.image} ended as they came back")
        if running := [m.pid for m in members if not m.stopped]:
            raise errors.CriuError(
                f"pids {running} came back running, before their GPU memory has", {"pids": running}
            )

    async def _end(self) -> None:
        await self._trees.end(self._task.tree_id, self._report.main or self._task.main)
        await self._trees.forget(self._task.tree_id)
