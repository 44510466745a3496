"""What a freeze and a thaw of one tree consist of: steps as data, each with its undo.

Covers: the steps, their order, and which undo follows a failure. Does not cover: performing a step
(``engine/moves.py``) or operations over several trees (``exchange.py``).

The order is the driver's: its own threads in the target serve these calls, so CPUs stop after the checkpoint and
continue before the restore.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Op(StrEnum):
    """One step over all members of a tree. Every step skips members that are already there."""

    LOCK = "lock"
    UNLOCK = "unlock"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    STOP = "stop"
    CONTINUE = "continue"


@dataclass(frozen=True, slots=True)
class Step:
    """A step and what takes it back. The undo also mends a step that failed half-way."""

    do: Op
    undo: Op


class Move(StrEnum):
    FREEZE = "freeze"
    THAW = "thaw"


STEPS: Final[dict[Move, tuple[Step, ...]]] = {
    Move.FREEZE: (
        Step(Op.LOCK, Op.UNLOCK),
        Step(Op.CHECKPOINT, Op.RESTORE),
        Step(Op.STOP, Op.CONTINUE),
    ),
    Move.THAW: (
        Step(Op.CONTINUE, Op.STOP),
        Step(Op.RESTORE, Op.CHECKPOINT),
        Step(Op.UNLOCK, Op.LOCK),
    ),
}


class Outcome(StrEnum):
    """How a move ended. The values are the names of the triggers in ``states.py``."""

    DONE = "done"
    ROLLED_BACK = "rolled_back"
    LOST = "lost"


def undo_after(move: Move, failed: int) -> tuple[Op, ...]:
    """The undo steps, newest first, after step number ``failed`` of ``move`` failed.

    The failed step's own undo comes first: a tree has several members, and some of them may have got there.
    """
    return tuple(step.undo for step in reversed(STEPS[move][: failed + 1]))
