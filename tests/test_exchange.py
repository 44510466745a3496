"""An exchange of trees, whatever each of its moves comes to: against a model of what is really where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched.domain.exchange import Exchange, Order, Phase
from gpusched.domain.moves import Move, Outcome

DONE, BACK, LOST = Outcome.DONE, Outcome.ROLLED_BACK, Outcome.LOST
TREES = ("a", "b", "c", "d")
ELSEWHERE = {"gpu-0": "gpu-1", "gpu-1": "gpu-0"}


@dataclass
class World:
    """What the engine and the driver make of the orders; ``on_gpu`` is None for a tree that was lost."""

    off: tuple[str, ...]
    on: Mapping[str, Mapping[str, str] | None]
    on_gpu: dict[str, bool | None] = field(default_factory=dict)
    moved_to: dict[str, Mapping[str, str] | None] = field(default_factory=dict)
    running: dict[str, Order] = field(default_factory=dict)
    log: list[tuple[Order, Outcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_gpu = {**dict.fromkeys(self.on, False), **dict.fromkeys(self.off, True)}
        self.before = dict(self.on_gpu)

    def take(self, orders: list[Order]) -> None:
        assert len({o.tree_id for o in orders}) == len(orders), "two orders for one tree at once"
        for order in orders:
            assert not self.running, "a phase began before the last one had ended"
            is_there = self.on_gpu[order.tree_id]
            assert is_there in (None, order.move is Move.FREEZE), f"{order} is done already"
            if order.is_undo:
                self._is_owed(order)
            elif order.move is Move.THAW:
                froze = {o.tree_id for o, outcome in self.log if outcome is DONE}
                assert froze == set(self.off), "something comes on before everything is off"
            else:
                assert order.gpu_map is None
        self.running = {o.tree_id: o for o in orders}

    def _is_owed(self, order: Order) -> None:
        """Only what was done is undone, all of ON before any of OFF, and onto the GPUs it came from."""
        assert order.gpu_map is None
        opposite = Move.THAW if order.move is Move.FREEZE else Move.FREEZE
        done = [(o.tree_id, o.move) for o, outcome in self.log if outcome is DONE and not o.is_undo]
        assert (order.tree_id, opposite) in done, f"{order} undoes what was never done"
        if order.move is Move.THAW:
            came = {t for t, move in done if move is Move.THAW}
            taken_back = {o.tree_id for o, _ in self.log if o.is_undo and o.move is Move.FREEZE}
            assert came == taken_back, "something goes back on before its room was given up"
            assert self.on_gpu[order.tree_id] is not True

    def end(self, tree_id: str, outcome: Outcome) -> None:
        order = self.running.pop(tree_id)
        self.log.append((order, outcome))
        if outcome is LOST:
            self.on_gpu[tree_id] = None
        elif outcome is DONE:
            self.on_gpu[tree_id] = order.move is Move.THAW
            self.moved_to[tree_id] = order.gpu_map

    def judge(self, exchange: Exchange) -> None:
        """The final outcome says what is true."""
        wanted = {**dict.fromkeys(self.off, False), **dict.fromkeys(self.on, True)}
        failed = [o for o, outcome in self.log if outcome is not DONE]
        if not failed:
            assert exchange.outcome is DONE
            assert self.on_gpu == wanted
            assert {t: self.moved_to[t] for t in self.on} == dict(self.on)
        elif exchange.outcome is BACK:
            assert self.on_gpu == self.before
            assert not any(self.moved_to.get(t) for t in self.on), "taken back to another GPU"
            assert not any(o.is_undo for o in failed)
        else:
            assert exchange.outcome is LOST
            lost = LOST in [outcome for _, outcome in self.log]
            assert lost or any(o.is_undo for o in failed), "called lost, and nothing was"
        # What was frozen for the exchange and has its copy in RAM was at least asked to come back.
        if exchange.outcome is not DONE:
            went = {
                o.tree_id
                for o, out in self.log
                if not o.is_undo and o.move is Move.FREEZE and out is DONE
            }
            asked = {o.tree_id for o, _ in self.log if o.is_undo and o.move is Move.THAW}
            # What could not be frozen again is on a GPU still: there is nothing to bring back.
            stayed = {
                o.tree_id
                for o, out in self.log
                if o.is_undo and o.move is Move.FREEZE and out is BACK
            }
            assert asked == went - stayed


@given(data=st.data())
def test_every_course_of_an_exchange_ends_and_says_what_is_true(data: st.DataObject) -> None:
    off = tuple(data.draw(st.sets(st.sampled_from(TREES)), label="off"))
    on = {
        tree: data.draw(st.sampled_from([None, ELSEWHERE]), label=f"map of {tree}")
        for tree in sorted(data.draw(st.sets(st.sampled_from(TREES)), label="on"))
    }
    exchange, world = Exchange(off=off, on=on), World(off, on)
    # Mostly good, so that the later phases are reached.
    outcomes = st.sampled_from([DONE, DONE, DONE, BACK, LOST])
    world.take(exchange.start())
    for _ in range(4 * len(TREES)):
        if not world.running:
            break
        tree = data.draw(st.sampled_from(sorted(world.running)), label="ends next")
        outcome = data.draw(outcomes, label=f"how {tree} ends")
        world.end(tree, outcome)
        orders = exchange.ended(tree, outcome)
        assert not (orders and world.running)
        if not world.running:
            world.take(orders)
    assert not world.running
    assert exchange.phase is Phase.ENDED
    world.judge(exchange)


def run(exchange: Exchange, *ends: tuple[str, Outcome]) -> list[str]:
    """The orders of each phase, as words, for a given course."""

    def words(orders: list[Order]) -> str:
        return " ".join(f"{'undo:' if o.is_undo else ''}{o.move}:{o.tree_id}" for o in orders)

    said = [words(exchange.start())]
    said += [text for tree, how in ends if (text := words(exchange.ended(tree, how)))]
    return said


@pytest.mark.parametrize(
    ("ends", "said", "outcome"),
    [
        ([("a", DONE), ("b", DONE)], ["freeze:a", "thaw:b"], DONE),
        ([("a", BACK)], ["freeze:a"], BACK),
        ([("a", LOST)], ["freeze:a"], LOST),
        ([("a", DONE), ("b", BACK), ("a", DONE)], ["freeze:a", "thaw:b", "undo:thaw:a"], BACK),
        ([("a", DONE), ("b", BACK), ("a", BACK)], ["freeze:a", "thaw:b", "undo:thaw:a"], LOST),
        ([("a", DONE), ("b", LOST), ("a", DONE)], ["freeze:a", "thaw:b", "undo:thaw:a"], LOST),
    ],
)
def test_a_swap_in_words(
    ends: list[tuple[str, Outcome]], said: list[str], outcome: Outcome
) -> None:
    exchange = Exchange(off=("a",), on={"b": None})
    assert run(exchange, *ends) == said
    assert (exchange.phase, exchange.outcome) == (Phase.ENDED, outcome)


def test_what_came_on_goes_off_again_before_the_others_come_back() -> None:
    exchange = Exchange(off=("a",), on={"b": None, "c": None})
    said = run(exchange, ("a", DONE), ("b", DONE), ("c", BACK), ("b", DONE), ("a", DONE))
    assert said == ["freeze:a", "thaw:b thaw:c", "undo:freeze:b", "undo:thaw:a"]
    assert exchange.outcome is BACK


def test_a_migration_that_fails_goes_back_to_where_it_was() -> None:
    exchange = Exchange(off=("a",), on={"a": ELSEWHERE})
    (freeze,) = exchange.start()
    (thaw,) = exchange.ended("a", DONE)
    (undo,) = exchange.ended("a", BACK)
    assert (freeze.move, thaw.move, thaw.gpu_map) == (Move.FREEZE, Move.THAW, ELSEWHERE)
    assert (undo.move, undo.gpu_map, undo.is_undo) == (Move.THAW, None, True)
    assert exchange.ended("a", DONE) == []
    assert exchange.outcome is BACK


def test_nothing_to_do_is_done_at_once() -> None:
    exchange = Exchange()
    assert exchange.start() == []
    assert (exchange.phase, exchange.outcome) == (Phase.ENDED, DONE)


def test_an_end_that_nobody_waits_for_is_a_defect() -> None:
    exchange = Exchange(off=("a",))
    exchange.start()
    with pytest.raises(KeyError):
        exchange.ended("b", DONE)
