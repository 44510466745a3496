"""Whether memory suffices: pure sums over bytes, with what running operations were promised taken off.

Why promises: an operation that was admitted takes its memory over seconds. Until then a second one would see the
same bytes free. A promise counts only for what its owner has not taken yet, so that nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """VRAM that one operation may still take: ``vram[uuid]`` bytes in all for its trees, on each GPU.

    It covers the way forward and the way back: an operation that freezes A and thaws B keeps room for the larger.
    """

    tree_ids: frozenset[str]
    vram: Mapping[str, int]
    host_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A GPU that has less room than is needed. All in bytes; ``promised`` is kept for running operations."""

    gpu: str
    need: int
    free: int
    promised: int

    @property
    def missing(self) -> int:
        return self.need - max(0, self.free - self.promised)


def add(*parts: Mapping[str, int]) -> dict[str, int]:
    """The sum for each key."""
    total: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def larger(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    """The larger value for each key."""
    return {key: max(a.get(key, 0), b.get(key, 0)) for key in {*a, *b}}


def outstanding(promise: Promise, held: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """What ``promise`` may still take, given what its trees hold now (``held[tree_id][uuid]``)."""
    have = add(*(held.get(tree_id, {}) for tree_id in promise.tree_ids))
    return {gpu: max(0, size - have.get(gpu, 0)) for gpu, size in promise.vram.items()}


def vram_shortages(
    *,
    need: Mapping[str, int],
    free: Mapping[str, int],
    promises: Iterable[Promise],
    held: Mapping[str, Mapping[str, int]],
) -> list[Shortage]:
    """The GPUs on which ``need`` does not fit beside what is in use and what was promised."""
    promised = add(*(outstanding(p, held) for p in promises))
    shortages = (
        Shortage(gpu=gpu, need=size, free=free.get(gpu, 0), promised=promised.get(gpu, 0))
        for gpu, size in need.items()
        if size > 0
    )
    return [s for s in shortages if s.missing > 0]


def remap(vram: Mapping[str, int], gpu_map: Mapping[str, str] | None) -> dict[str, int]:
    """``vram`` as it will lie after a restore with ``gpu_map``."""
    return {(gpu_map or {}).get(gpu, gpu): size for gpu, size in vram.items()}
