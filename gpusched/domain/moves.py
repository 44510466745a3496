"""What the moves of one tree consist of: steps as data, each with its undo.

Covers: the steps, their order, and which undo follows a failure. Does not cover: performing a step
(``engine/moves.py``, ``engine/disk_moves.py``) or operations over several trees (``exchange.py``).

Between GPU and RAM the order is the driver's: its own threads in the target serve these calls, so CPUs stop after the
checkpoint and continue before the restore. Between RAM and disk it is that of the last copy: the image is complete,
checked and under its name before the original ends, and stays until the driver has brought the next one back.
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
    #: Only those whose contexts are on a GPU.
    CONTINUE_KEPT = "continue_kept"
    #: The tree as an image on disk, committed. Undone, nothing of that image is left.
    SAVE = "save"
    DISCARD = "discard"
    #: The processes come back from the image, stopped, in namespaces of their own.
    REVIVE = "revive"
    #: The processes end; an image of them is there.
    END = "end"


@dataclass(frozen=True, slots=True)
class Step:
    """A step and what takes it back. The undo also mends a step that failed half-way.

    Without an undo there is no way back, and none is needed: the next copy is complete, whatever becomes of the step.
    """

    do: Op
    undo: Op | None


class Move(StrEnum):
    FREEZE = "freeze"
    #: What a freeze has left of a tree on the GPU, its CUDA contexts, leaves it too.
    DEEPEN = "deepen"
    THAW = "thaw"
    HIBERNATE = "hibernate"
    WAKE = "wake"
    #: An image for copies; the tree itself stays where it is.
    SAVE = "save"
    #: Back to the image that it has just come from, before it has run.
    RETREAT = "retreat"


STEPS: Final[dict[Move, tuple[Step, ...]]] = {
    Move.FREEZE: (
        Step(Op.LOCK, Op.UNLOCK),
        Step(Op.CHECKPOINT, Op.RESTORE),
        Step(Op.STOP, Op.CONTINUE),
    ),
    # Whatever fails, the contents are where they were: all there is to mend is that it runs.
    Move.DEEPEN: (
        Step(Op.CONTINUE_KEPT, Op.STOP),
        Step(Op.CHECKPOINT, Op.STOP),
        Step(Op.STOP, Op.STOP),
    ),
    Move.THAW: (
        Step(Op.CONTINUE, Op.STOP),
        Step(Op.RESTORE, Op.CHECKPOINT),
        Step(Op.UNLOCK, Op.LOCK),
    ),
    Move.HIBERNATE: (Step(Op.SAVE, Op.DISCARD), Step(Op.END, None)),
    Move.WAKE: (Step(Op.REVIVE, Op.END),),
    Move.SAVE: (Step(Op.SAVE, Op.DISCARD),),
    Move.RETREAT: (Step(Op.END, None),),
}


class Outcome(StrEnum):
    """How a move ended. The values are the names of the triggers in ``states.py``."""

    DONE = "done"
    ROLLED_BACK = "rolled_back"
    LOST = "lost"


def undo_after(move: Move, failed: int) -> tuple[Op, ...]:
    """The undo steps, newest first, after step number ``failed`` of ``move`` failed.

    The failed step's own undo comes first: a tree has several members, and some of them may have got there. Nothing is
    undone after a step without a way back.
    """
    undone = [step.undo for step in reversed(STEPS[move][: failed + 1])]
    return () if None in undone else tuple(undo for undo in undone if undo is not None)
