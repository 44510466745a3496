"""The one multi-process operation: move some trees down the tiers, then some up; all or nothing.

Freeze is an exchange with only ``off``, thaw one with only ``on``; swap has both, thaw-with-eviction has the victims
in ``off``, and migrate has the same tree in both. A hibernation is ``off`` and then ``down``, a wake ``up`` and then
``on``. So there is one place for the order of moves and for what a failure undoes. Pure: the engine performs the orders
and reports how each one ended.

The phases, in order:
0. DEEPEN: frozen trees give up the contexts that they have kept on the GPU, because 1 or 3 need that or nobody wants
   them there any more.
1. ROOM: frozen trees go to disk, because 2 needs the RAM. They stay there, whatever comes after.
2. OFF: all of ``off`` freeze, at the same time.
3. DOWN: all of ``down``, which are frozen by now, are saved to disk.
4. UP: all of ``up`` come back from disk, frozen.
5. ON: all of ``on`` thaw, at the same time, when everything before is done.
6. UNDO_ON, only after a failure in 5: what had thawed is frozen again. What had come from disk stays in RAM.
7. UNDO_UP, only after a failure in 4: what had come from disk is there still, and goes back to that.
8. UNDO_OFF, only after a failure: what 2 froze is thawed again, onto the GPUs it came from, unless it is on disk now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import assert_never

from gpusched.domain.moves import Move, Outcome


class Phase(Enum):
    DEEPEN = auto()
    ROOM = auto()
    OFF = auto()
    DOWN = auto()
    UP = auto()
    ON = auto()
    UNDO_ON = auto()
    UNDO_UP = auto()
    UNDO_OFF = auto()
    ENDED = auto()


#: GPU UUID -> GPU UUID, a full permutation; None leaves a tree where it was.
GpuMap = Mapping[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One move that the engine is to perform now."""

    tree_id: str
    move: Move
    gpu_map: GpuMap = None
    is_undo: bool = False


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Tree ids to move down and up (each of ``on`` with its GPU map), and how far that has come.

    ``down`` says for each tree whether it goes to disk (HIBERNATE) or leaves a copy there (SAVE). ``owed`` were frozen
    for this by the exchange before it: a failure thaws them.
    """

    deepen: tuple[str, ...] = ()
    room: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    down: Mapping[str, Move] = field(default_factory=dict)
    up: tuple[str, ...] = ()
    on: Mapping[str, GpuMap] = field(default_factory=dict)
    owed: tuple[str, ...] = ()
    phase: Phase = Phase.DEEPEN
    outcome: Outcome | None = None
    _waiting: set[str] = field(default_factory=set)
    _ended: dict[str, Outcome] = field(default_factory=dict)  # of the current phase
    _went_off: tuple[str, ...] = ()
    _went_up: tuple[str, ...] = ()
    _went_on: tuple[str, ...] = ()
    _failed: bool = False
    _lost: bool = False

    def __post_init__(self) -> None:
        self._went_off = self.owed

    @property
    def trees(self) -> tuple[str, ...]:
        """Everyone whom it is about, once each."""
        return tuple(
            dict.fromkeys((*self.deepen, *self.room, *self.off, *self.down, *self.up, *self.on))
        )

    def start(self) -> list[Order]:
        """The first orders; none at all (and an outcome) when there is nothing to do."""
        return self._enter(Phase.DEEPEN)

    def give_up(self) -> list[Order]:
        """The orders for an exchange that must not begin: those that give back what is owed."""
        return self._enter(Phase.UNDO_OFF)

    def ended(self, tree_id: str, outcome: Outcome) -> list[Order]:
        """Takes note of one ended move; returns what to do next (often nothing yet).

        When ``phase`` is ENDED afterwards, ``outcome`` says how the whole ended.
        """
        self._waiting.remove(tree_id)
        self._ended[tree_id] = outcome
        self._lost |= outcome is Outcome.LOST
        if self._waiting:
            return []
        done = tuple(t for t, o in self._ended.items() if o is Outcome.DONE)
        return self._after(done, all_done=len(done) == len(self._ended))

    def _after(self, done: tuple[str, ...], *, all_done: bool) -> list[Order]:
        """What follows the current phase, of which ``done`` reached their goal."""
        match self.phase:
            case Phase.DEEPEN:
                return self._enter(Phase.ROOM if all_done else Phase.UNDO_OFF)
            case Phase.ROOM:
                return self._enter(Phase.OFF if all_done else Phase.UNDO_OFF)
            case Phase.OFF:
                self._went_off = (*self.owed, *done)
                return self._enter(Phase.DOWN if all_done else Phase.UNDO_OFF)
            case Phase.DOWN:
                gone = {t for t in done if self.down[t] is Move.HIBERNATE}
                self._went_off = tuple(t for t in self._went_off if t not in gone)
                return self._enter(Phase.UP if all_done else Phase.UNDO_OFF)
            case Phase.UP:
                self._went_up = done
                return self._enter(Phase.ON if all_done else Phase.UNDO_UP)
            case Phase.ON:
                self._went_on = done
                return self._enter(Phase.ENDED if all_done else Phase.UNDO_ON)
            case Phase.UNDO_ON:
                # What could not be frozen again still holds the room that UNDO_OFF needs; it is tried all the same.
                self._lost |= not all_done
                stayed = {t for t, o in self._ended.items() if o is Outcome.ROLLED_BACK}
                self._went_off = tuple(t for t in self._went_off if t not in stayed)
                return self._enter(Phase.UNDO_OFF)
            case Phase.UNDO_UP:
                self._lost |= not all_done
                return self._enter(Phase.UNDO_OFF)
            case _:
                self._lost |= not all_done
                return self._enter(Phase.ENDED)

    def _enter(self, phase: Phase) -> list[Order]:
        """Enters ``phase``, or the next one that has anything to do."""
        self.phase = phase
        self._ended = {}
        self._failed |= phase in (Phase.UNDO_ON, Phase.UNDO_UP, Phase.UNDO_OFF)
        orders: list[Order]
        match phase:
            case Phase.DEEPEN:
                orders = [Order(tree_id=t, move=Move.DEEPEN) for t in self.deepen]
                following = Phase.ROOM
            case Phase.ROOM:
                orders = [Order(tree_id=t, move=Move.HIBERNATE) for t in self.room]
                following = Phase.OFF
            case Phase.OFF:
                orders = [Order(tree_id=t, move=Move.FREEZE) for t in self.off]
                following = Phase.DOWN
            case Phase.DOWN:
                orders = [Order(tree_id=t, move=m) for t, m in self.down.items()]
                following = Phase.UP
            case Phase.UP:
                orders = [Order(tree_id=t, move=Move.WAKE) for t in self.up]
                following = Phase.ON
            case Phase.ON:
                orders = [Order(tree_id=t, move=Move.THAW, gpu_map=m) for t, m in self.on.items()]
                following = Phase.ENDED
            case Phase.UNDO_ON:
                orders = [Order(tree_id=t, move=Move.FREEZE, is_undo=True) for t in self._went_on]
                following = Phase.UNDO_OFF
            case Phase.UNDO_UP:
                orders = [Order(tree_id=t, move=Move.RETREAT, is_undo=True) for t in self._went_up]
                following = Phase.UNDO_OFF
            case Phase.UNDO_OFF:
                orders = [Order(tree_id=t, move=Move.THAW, is_undo=True) for t in self._went_off]
                following = Phase.ENDED
            case Phase.ENDED:
                self.outcome = self._result()
                return []
            case _:
                assert_never(phase)
        self._waiting = {o.tree_id for o in orders}
        if orders:
            return orders
        return self._enter(following)

    def _result(self) -> Outcome:
        if self._lost:
            return Outcome.LOST
        return Outcome.ROLLED_BACK if self._failed else Outcome.DONE
