"""Performing one move on one tree: the steps of ``domain/moves.py`` in order, undone when one fails.

See ``steps.py`` for what each step does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from gpusched import errors
from gpusched.domain.moves import STEPS, Move, Outcome, undo_after
from gpusched.engine.model import Report, Tree
from gpusched.engine.steps import Ground, Work
from gpusched.ports import Clock, Driver, DriverState, Member, Trees

log = logging.getLogger(__name__)

UNDO_ATTEMPTS: Final = 3


class Mover:
    """Performs moves. Holds no state between them; one instance serves all trees."""

    def __init__(self, driver: Driver, trees: Trees, clock: Clock, lock_timeout_s: float) -> None:
        self._ground = Ground(driver, trees, clock, lock_timeout_s)

    async def run(
        self,
        tree: Tree,
        move: Move,
        gpu_map: Mapping[str, str] | None = None,
        *,
        keep_context: bool = False,
    ) -> Report:
        """Performs ``move``. Blocks for as long as the driver takes; never raises for what a tree or driver does.

        ``keep_context``: a freeze leaves CUDA contexts on the GPU, where the driver can.
        DONE: the tree is where the move leads, and the driver says so. ROLLED_BACK: it is where it was, or has ended
        (``error`` is ProcessExited). LOST: it is neither, and ``error`` and ``note`` say what is known.
        """
        work = Work(self._ground, tree, gpu_map, keep_context=keep_context)
        last = len(STEPS[move]) - 1
        error: errors.GpuschedError | None = None
        for number, step in enumerate(STEPS[move]):
            error = await work.perform(step.do)
            if error is None and number == last:
                error = await work.verify(frozen=move is not Move.THAW)
            if error is not None:
                last = number
                break
        if error is None:
            return Report(
                outcome=Outcome.DONE,
                phases_ms=work.phases_ms,
                driver_ms=work.driver_ms,
                oom_scores=work.oom_scores,
                moved=dict(tree.moved) if move is Move.DEEPEN else {},
                kept=await self._kept(work) if keep_context else {},
                late=work.late,
            )
        log.warning("move failed move=%s tree=%s error=%s", move, tree.tree_id, error)
        undone, scores = await self._undo(work.left_behind(), move, last)
        if isinstance(undone, errors.ProcessExited):
            error, undone = undone, None  # nothing is left that could be taken back
        return Report(
            outcome=Outcome.ROLLED_BACK if undone is None else Outcome.LOST,
            phases_ms=work.phases_ms,
            driver_ms=work.driver_ms,
            oom_scores=dict(scores),
            moved=work.moved if move is not Move.FREEZE or undone is not None else {},
            kept=await self._kept(work) if move is not Move.FREEZE and undone is None else {},
            error=error,
            note="" if undone is None else f"taking it back failed too: {undone}",
        )

    async def settle(self, tree: Tree) -> tuple[list[Member], dict[int, DriverState]]:
        """See ``Ground.settle``."""
        return await self._ground.settle(tree)

    async def _kept(self, work: Work) -> dict[str, int]:
        with contextlib.suppress(errors.GpuschedError):  # the freeze is done, whatever it left
            return await work.held()
        return {}

    async def _undo(
        self, tree: Tree, move: Move, failed: int
    ) -> tuple[errors.GpuschedError | None, Mapping[int, int]]:
        """Takes a failed move back, newest step first; returns why it could not, and the scores still to put back."""
        last: errors.GpuschedError | None = None
        for attempt in range(UNDO_ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.2 * attempt)
            work = Work(self._ground, tree, is_undo=True)
            last = None
            for op in undo_after(move, failed):
                last = await work.perform(op)
                if last is not None:
                    break
            if last is None:
                last = await work.verify(frozen=move is not Move.FREEZE)
            tree = replace(work.left_behind(), moved=tree.moved)
            if last is None or isinstance(last, errors.ProcessExited):
                break
        return last, tree.oom_scores
