"""Who makes room: the least recently used, no more of them than needed, or nobody."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched.domain.eviction import Candidate, choose_victims


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
