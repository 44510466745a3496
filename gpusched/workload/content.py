"""What the workload writes on a real GPU, and the digest of it: the CPU's version of ``kernels.cu``.

The contents are 64-bit words, numbered through all allocations. Slow (about a million words a second): for checking
the kernels on a small part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

WORD_BYTES: Final = 8
_MASK: Final = 2**64 - 1


def step(start: int, index: int) -> int:
    """Step number ``index`` of SplitMix64 from ``start``."""
    z = (start + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def words(seed: int, first: int, count: int) -> list[int]:
    """The words number ``first`` to ``first + count - 1``."""
    return [step(seed, index) for index in range(first, first + count)]


def digest(contents: Iterable[int], first: int) -> int:
    """The digest of words from number ``first`` on. Digests of parts add up (modulo 2**64) to that of the whole."""
    return sum(step(word, index) for index, word in enumerate(contents, first)) & _MASK
