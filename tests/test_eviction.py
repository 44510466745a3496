"""Who makes room: the least recently used, no more of them than needed, or nobody."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched.domain.eviction import (
    Candidate,
    Cold,
    LeastRecentlyUsed,
    ahead_of_need,
    choose_victims,
)


def candidate(name: str, used_s: float, **vram: int) -> Candidate:
    return Candidate(tree_id=name, last_used_unix_s=used_s, vram=vram)


OLD, MID, NEW = (
    candidate("old", 1, g0=4),
    candidate("mid", 2, g0=8),
    candidate("new", 3, g0=4, g1=4),
)


@pytest.mark.parametrize(
    ("missing", "victims"),
    [
        ({"g0": 3}, ("old",)),
        ({"g0": 4}, ("old",)),
        ({"g0": 12}, ("old", "mid")),
        ({"g0": 16}, ("old", "mid", "new")),
        ({"g0": 17}, None),
        ({"g1": 1}, ("new",)),  # the others have nothing there
        ({"g1": 5}, None),
        ({"g2": 1}, None),
        ({"g0": 0}, ()),
        ({}, ()),
    ],
)
def test_the_least_recently_used_go_first(
    missing: dict[str, int], victims: tuple[str, ...] | None
) -> None:
    for order in itertools.permutations([OLD, MID, NEW]):
        assert choose_victims(order, missing) == victims


def test_equals_go_by_their_id() -> None:
    assert choose_victims([candidate("b", 1, g0=1), candidate("a", 1, g0=1)], {"g0": 1}) == ("a",)


_BYTES = st.dictionaries(st.sampled_from(["g0", "g1"]), st.integers(0, 20))


@given(
    held=st.lists(st.tuples(st.integers(0, 5), _BYTES), max_size=6),
    missing=_BYTES,
)
def test_victims_suffice_and_each_one_is_needed_in_its_turn(
    held: list[tuple[int, dict[str, int]]], missing: dict[str, int]
) -> None:
    candidates = [
        Candidate(tree_id=f"t{i}", last_used_unix_s=used, vram=vram)
        for i, (used, vram) in enumerate(held)
    ]
    by_id = {c.tree_id: c for c in candidates}

    def freed(names: tuple[str, ...]) -> dict[str, int]:
        return {g: sum(by_id[n].vram.get(g, 0) for n in names) for g in missing}

    def suffices(names: tuple[str, ...]) -> bool:
        return all(freed(names)[g] >= size for g, size in missing.items())

    victims = choose_victims(candidates, missing)
    if victims is None:
        assert not suffices(tuple(by_id))
        return
    assert suffices(victims)
    assert len(set(victims)) == len(victims)
    for count, name in enumerate(victims):
        # Chosen only because something was still short, and because it has some of that.
        still = {g for g, size in missing.items() if freed(victims[:count])[g] < size}
        assert any(by_id[name].vram.get(g, 0) for g in still)
    ages = [(by_id[n].last_used_unix_s, n) for n in victims]
    assert ages == sorted(ages)


def cold(name: str, used_s: float, size: int) -> Cold:
    return Cold(tree_id=name, last_used_unix_s=used_s, ram_bytes=size)


@pytest.mark.parametrize(
    ("used", "reserve", "first"),
    [
        (60, 40, None),  # it is free already
        (61, 40, "old"),
        (100, 40, "old"),
        (60, 0, None),
        (100, 1000, "old"),  # more than there is: as far as it goes
    ],
)
def test_ahead_of_need_the_coldest_goes_until_the_reserve_is_free(
    used: int, reserve: int, first: str | None
) -> None:
    for order in itertools.permutations([cold("old", 1, 5), cold("mid", 2, 30), cold("new", 3, 1)]):
        assert (
            ahead_of_need(
                LeastRecentlyUsed(),
                order,
                used_bytes=used,
                budget_bytes=100,
                reserve_bytes=reserve,
            )
            == first
        )


def test_ahead_of_need_nobody_goes_where_nobody_can() -> None:
    sizes = {"used_bytes": 100, "budget_bytes": 100, "reserve_bytes": 10}
    assert ahead_of_need(LeastRecentlyUsed(), [], **sizes) is None
    assert ahead_of_need(LeastRecentlyUsed(), [cold("empty", 1, 0)], **sizes) is None


def turns(
    pattern: Callable[[int, int], int], models: int, budget: int, reserve: int
) -> Counter[str]:
    """1000 phases of models of size 1, one of them on the GPU at a time: freezes that waited for a save, and wakes."""
    policy, counts = LeastRecentlyUsed(), Counter[str]()
    used = dict.fromkeys(range(models), 0)
    active, frozen = 0, set(range(1, budget + 1))

    def evict(missing: int, kept: int | None, what: str) -> None:
        sizes = [cold(str(n), used[n], 1) for n in frozen if n != kept]
        for name in policy.choose(sizes, missing) or ():
            frozen.discard(int(name))
            counts[what] += 1

    for phase in range(1000):
        wanted = pattern(phase, active)
        if wanted == active:
            continue
        evict(len(frozen) + 1 - budget, wanted, "waited")
        frozen.add(active)
        used[active] = used[wanted] = 1 + phase
        counts["wakes"] += wanted not in frozen
        frozen.discard(wanted)
        active = wanted
        if reserve:
            evict(len(frozen) + reserve - budget, None, "ahead")
    return counts


@pytest.mark.parametrize(
    ("name", "models", "waited", "wakes", "wakes_ahead"),
    [
        ("each in its turn", 4, 500, 500, 999),
        ("at random", 6, 144, 144, 173),
        ("one between the others", 4, 500, 499, 499),
    ],
)
def test_what_a_reserve_costs_and_saves(
    name: str, models: int, waited: int, wakes: int, wakes_ahead: int
) -> None:
    """The figures of decision 0016."""
    rng = random.Random(1)
    patterns: dict[str, Callable[[int, int], int]] = {
        "each in its turn": lambda _, active: (active + 1) % models,
        "at random": lambda _, __: rng.randrange(models),
        "one between the others": lambda n, active: 0 if active else 1 + n // 2 % (models - 1),
    }
    asked = turns(patterns[name], models, models - 1, 0)
    rng.seed(1)
    ahead = turns(patterns[name], models, models - 1, 1)
    print(name, asked, ahead)
    assert (asked["waited"], asked["wakes"], ahead["wakes"]) == (waited, wakes, wakes_ahead)
    assert ahead["waited"] <= 1
