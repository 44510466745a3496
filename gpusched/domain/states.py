"""The states of a managed process and the one table of how it moves between them.

Nothing else in the project assigns a state: the engine looks every change up here.
See also: ``moves.py`` (what a freeze or thaw consists of), ``exchange.py`` (operations over several processes).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class ProcState(StrEnum):
    """Where a managed process is. The values are wire names."""

    STARTING = "starting"
    ACTIVE = "active"
    FREEZING = "freezing"
    FROZEN = "frozen"
    THAWING = "thawing"
    HIBERNATING = "hibernating"
    HIBERNATED = "hibernated"
    WAKING = "waking"
    FAILED = "failed"
    DEAD = "dead"


class Tier(StrEnum):
    """Where the authoritative copy of a process's device memory is. Derived, never stored."""

    GPU = "gpu"
    RAM = "ram"
    DISK = "disk"


class Trigger(StrEnum):
    """What can happen to a process: the start or end of a move, or something that was observed."""

    STARTED = "started"
    FREEZE = "freeze"
    DEEPEN = "deepen"
    THAW = "thaw"
    HIBERNATE = "hibernate"
    WAKE = "wake"
    SAVE = "save"
    RETREAT = "retreat"
    SAVED = "saved"
    DEEPENED = "deepened"
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    LOST = "lost"
    EXITED = "exited"
    FOUND_ACTIVE = "found_active"
    FOUND_FROZEN = "found_frozen"
    FOUND_HIBERNATED = "found_hibernated"
    FOUND_BROKEN = "found_broken"


_S = ProcState
_T = Trigger

#: (state, trigger) -> next state. A pair that is not here is illegal and changes nothing.
TRANSITIONS: Final[Mapping[tuple[ProcState, Trigger], ProcState]] = MappingProxyType(
    {
        (_S.STARTING, _T.STARTED): _S.ACTIVE,
        (_S.STARTING, _T.EXITED): _S.DEAD,
        (_S.ACTIVE, _T.FREEZE): _S.FREEZING,
        (_S.ACTIVE, _T.EXITED): _S.DEAD,
        (_S.FREEZING, _T.DONE): _S.FROZEN,
        (_S.FREEZING, _T.ROLLED_BACK): _S.ACTIVE,
        (_S.FREEZING, _T.LOST): _S.FAILED,
        (_S.FREEZING, _T.EXITED): _S.DEAD,
        (_S.FROZEN, _T.THAW): _S.THAWING,
        # Frozen all the time: of its contents nothing moves, only its context leaves the GPU.
        (_S.FROZEN, _T.DEEPEN): _S.FROZEN,
        (_S.FROZEN, _T.DEEPENED): _S.FROZEN,
        (_S.FROZEN, _T.ROLLED_BACK): _S.FROZEN,
        (_S.FROZEN, _T.LOST): _S.FAILED,
        (_S.FROZEN, _T.EXITED): _S.DEAD,
        (_S.THAWING, _T.DONE): _S.ACTIVE,
        (_S.THAWING, _T.ROLLED_BACK): _S.FROZEN,
        (_S.THAWING, _T.LOST): _S.FAILED,
        (_S.THAWING, _T.EXITED): _S.DEAD,
        # Its image is being written; for a hibernation the process ends when that is done.
        (_S.FROZEN, _T.HIBERNATE): _S.HIBERNATING,
        (_S.FROZEN, _T.SAVE): _S.HIBERNATING,
        (_S.FROZEN, _T.RETREAT): _S.HIBERNATING,
        (_S.HIBERNATING, _T.DONE): _S.HIBERNATED,
        (_S.HIBERNATING, _T.SAVED): _S.FROZEN,
        (_S.HIBERNATING, _T.ROLLED_BACK): _S.FROZEN,
        (_S.HIBERNATING, _T.LOST): _S.FAILED,
        (_S.HIBERNATING, _T.EXITED): _S.DEAD,
        (_S.HIBERNATED, _T.WAKE): _S.WAKING,
        (_S.WAKING, _T.DONE): _S.FROZEN,
        # Its image is whole, whatever became of the processes.
        (_S.WAKING, _T.ROLLED_BACK): _S.HIBERNATED,
        (_S.WAKING, _T.LOST): _S.HIBERNATED,
        # Its image has vanished: nobody can wake it again.
        (_S.WAKING, _T.EXITED): _S.DEAD,
        (_S.HIBERNATED, _T.EXITED): _S.DEAD,
        (_S.FAILED, _T.EXITED): _S.DEAD,
        # Worth another try: every step looks at the driver first.
        (_S.FAILED, _T.FREEZE): _S.FREEZING,
        (_S.FAILED, _T.THAW): _S.THAWING,
        # A move that outlived its process still ends; the process stays dead.
        (_S.DEAD, _T.DONE): _S.DEAD,
        (_S.DEAD, _T.ROLLED_BACK): _S.DEAD,
        (_S.DEAD, _T.LOST): _S.DEAD,
        (_S.DEAD, _T.SAVED): _S.DEAD,
        (_S.DEAD, _T.DEEPENED): _S.DEAD,
        (_S.DEAD, _T.EXITED): _S.DEAD,
        # Reality over memory: what a look at the driver showed, at recovery or after a failure.
        **{
            (state, trigger): found
            for state in (
                *(_S.ACTIVE, _S.FREEZING, _S.FROZEN, _S.THAWING),
                *(_S.HIBERNATING, _S.HIBERNATED, _S.WAKING, _S.FAILED),
            )
            for trigger, found in (
                (_T.FOUND_ACTIVE, _S.ACTIVE),
                (_T.FOUND_FROZEN, _S.FROZEN),
                (_T.FOUND_HIBERNATED, _S.HIBERNATED),
                (_T.FOUND_BROKEN, _S.FAILED),
            )
        },
    }
)

#: A move is under way: exactly one ``DONE``, ``SAVED``, ``ROLLED_BACK`` or ``LOST`` will follow.
MOVING: Final = frozenset({_S.FREEZING, _S.THAWING, _S.HIBERNATING, _S.WAKING})


class InvalidTransition(Exception):
    """The pair (state, trigger) is not in the table: a defect, since requests are checked first."""


def transition(state: ProcState, trigger: Trigger) -> ProcState:
    """The state after ``trigger``. Raises InvalidTransition for a pair that the table does not have."""
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        raise InvalidTransition(f"{trigger} is not possible in state {state}") from None


def tier_of(state: ProcState) -> Tier:
    """The tier of ``state``; a wire promise: gpu for all but frozen and hibernated."""
    return {_S.FROZEN: Tier.RAM, _S.HIBERNATED: Tier.DISK}.get(state, Tier.GPU)
