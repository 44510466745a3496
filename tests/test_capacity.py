"""Sums over bytes: whether something fits beside what is there and what was promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched.domain.capacity import (
    Promise,
    Shortage,
    add,
    larger,
    outstanding,
    remap,
    vram_shortages,
)

GPUS = ("g0", "g1", "g2")
SIZES = st.dictionaries(st.sampled_from(GPUS), st.integers(0, 100))
HELD = st.dictionaries(st.sampled_from("abcd"), SIZES)
PROMISES = st.lists(
    st.builds(
        Promise,
        tree_ids=st.frozensets(st.sampled_from("abcd")),
        vram=SIZES,
        host_bytes=st.integers(0, 100),
    ),
    max_size=3,
)


def promise(trees: str, **vram: int) -> Promise:
    return Promise(tree_ids=frozenset(trees), vram=vram)


def test_sums_and_maxima_are_for_each_gpu() -> None:
    assert add({"g0": 1, "g1": 2}, {"g1": 3}, {}) == {"g0": 1, "g1": 5}
    assert larger({"g0": 1, "g1": 2}, {"g1": 3}) == {"g0": 1, "g1": 3}
    assert add() == {}


def test_a_promise_counts_for_what_was_not_taken_yet() -> None:
    kept = promise("ab", g0=10, g1=5)
    assert outstanding(kept, {}) == {"g0": 10, "g1": 5}
    assert outstanding(kept, {"a": {"g0": 4}, "b": {"g0": 3, "g1": 9}, "c": {"g0": 99}}) == {
        "g0": 3,
        "g1": 0,
    }


@pytest.mark.parametrize(
    ("need", "free", "promises", "missing"),
    [
        (10, 10, [], None),
        (10, 9, [], 1),
        (0, 0, [], None),
        (10, 20, [promise("x", g0=10)], None),
        (10, 20, [promise("x", g0=11)], 1),
        (10, 20, [promise("x", g0=6), promise("y", g0=6)], 2),
        (10, 20, [promise("x", g1=99)], None),
        (10, 5, [promise("x", g0=99)], 10),  # never more than is needed
    ],
)
def test_what_is_missing(
    need: int, free: int, promises: list[Promise], missing: int | None
) -> None:
    found = vram_shortages(need={"g0": need}, free={"g0": free}, promises=promises, held={})
    assert [s.missing for s in found] == ([] if missing is None else [missing])


def test_a_gpu_that_nobody_reports_has_nothing_free() -> None:
    (found,) = vram_shortages(need={"gone": 7}, free={"g0": 99}, promises=[], held={})
    assert found == Shortage(gpu="gone", need=7, free=0, promised=0)


@given(need=SIZES, free=SIZES, promises=PROMISES, held=HELD)
def test_what_is_let_through_fits_even_when_every_promise_is_taken(
    need: dict[str, int],
    free: dict[str, int],
    promises: list[Promise],
    held: dict[str, dict[str, int]],
) -> None:
    short = {s.gpu: s for s in vram_shortages(need=need, free=free, promises=promises, held=held)}
    for gpu, size in need.items():
        owed = sum(outstanding(p, held).get(gpu, 0) for p in promises)
        room = max(0, free.get(gpu, 0) - owed)
        if gpu in short:
            assert 0 < short[gpu].missing == size - room <= size
        else:
            assert size <= room or size == 0
    assert set(short) <= set(need)


@given(need=SIZES, free=SIZES, promises=PROMISES, held=HELD)
def test_one_more_promise_never_makes_room(
    need: dict[str, int],
    free: dict[str, int],
    promises: list[Promise],
    held: dict[str, dict[str, int]],
) -> None:
    def missing(kept: list[Promise]) -> dict[str, int]:
        found = vram_shortages(need=need, free=free, promises=kept, held=held)
        return {s.gpu: s.missing for s in found}

    before = missing(promises[1:])
    after = missing(promises)
    assert all(after.get(gpu, 0) >= size for gpu, size in before.items())


@given(vram=SIZES, order=st.permutations(GPUS))
def test_a_permutation_moves_every_byte_and_its_inverse_moves_it_back(
    vram: dict[str, int], order: list[str]
) -> None:
    gpu_map = dict(zip(GPUS, order, strict=True))
    moved = remap(vram, gpu_map)
    assert sorted(moved.values()) == sorted(vram.values())
    assert remap(moved, {new: old for old, new in gpu_map.items()}) == vram
    assert remap(vram, None) == vram
