"""The permutation that takes a process to other GPUs: always full, and always going where it was asked to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched.domain.placement import onward, permutation

GPUS = ("g0", "g1", "g2", "g3")


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("0", "1", "1023"),
        ("0", "0", "0123"),
        ("01", "10", "1023"),
        ("01", "12", "1203"),
        ("01", "23", "2301"),
        ("0123", "3210", "3210"),
        ("", "", "0123"),
    ],
)
def test_where_everybody_goes(source: str, target: str, expected: str) -> None:
    found = permutation(GPUS, [f"g{i}" for i in source], [f"g{i}" for i in target])
    assert found == dict(zip(GPUS, [f"g{i}" for i in expected], strict=True))


@given(data=st.data(), size=st.integers(1, 8))
def test_every_gpu_goes_somewhere_and_nothing_moves_without_need(
    data: st.DataObject, size: int
) -> None:
    gpus = [f"g{i}" for i in range(size)]
    count = data.draw(st.integers(0, size))
    source = data.draw(st.permutations(gpus))[:count]
    target = data.draw(st.permutations(gpus))[:count]
    found = permutation(gpus, source, target)
    assert list(found) == gpus
    assert sorted(found.values()) == gpus
    assert [found[g] for g in source] == target
    assert all(found[g] == g for g in set(gpus) - set(source) - set(target))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (["g0"], ["g1", "g2"]),
        (["g0", "g0"], ["g1", "g2"]),
        (["g0", "g1"], ["g2", "g2"]),
        (["g0"], ["g9"]),
        (["g9"], ["g0"]),
    ],
)
def test_what_cannot_be_is_refused(source: list[str], target: list[str]) -> None:
    with pytest.raises(ValueError):
        permutation(GPUS, source, target)


_MAPS = st.none() | st.permutations(GPUS).map(lambda order: dict(zip(GPUS, order, strict=True)))


@given(moved=_MAPS, wanted=_MAPS)
def test_contents_that_were_moved_before_end_where_they_are_wanted(
    moved: dict[str, str] | None, wanted: dict[str, str] | None
) -> None:
    found = onward(moved, wanted)
    for home in GPUS:
        now = (moved or {}).get(home, home)
        assert (found or {}).get(now, now) == (wanted or {}).get(home, home)
    if found is not None:
        assert sorted(found) == sorted(found.values()) == list(GPUS)
        assert any(source != target for source, target in found.items())
