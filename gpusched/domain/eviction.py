"""Who makes room: the least recently used processes that may be frozen for somebody else. A pure decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An active, idle, unleased process that the caller may evict; ``vram[uuid]`` in bytes."""

    tree_id: str
    last_used_unix_s: float
    vram: Mapping[str, int]


def choose_victims(
    candidates: Iterable[Candidate], missing: Mapping[str, int]
) -> tuple[str, ...] | None:
    """The fewest least-recently-used candidates that free ``missing`` bytes on each GPU; None if none do."""
    left = {gpu: size for gpu, size in missing.items() if size > 0}
    victims: list[str] = []
    for candidate in sorted(candidates, key=lambda c: (c.last_used_unix_s, c.tree_id)):
        if not left:
            break
        helps = {gpu: size for gpu, size in candidate.vram.items() if gpu in left and size > 0}
        if not helps:
            continue
        victims.append(candidate.tree_id)
        left = {g: s - helps.get(g, 0) for g, s in left.items() if s > helps.get(g, 0)}
    return None if left else tuple(victims)
