"""Who makes room: the least recently used processes that may go for somebody else. Pure decisions.

Covers: off a GPU (``choose_victims``) and out of host RAM (a ``DiskPolicy``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """A frozen, idle, unleased process that can be saved to disk; ``ram_bytes`` is what that frees."""

    tree_id: str
    last_used_unix_s: float
    ram_bytes: int


class DiskPolicy(Protocol):
    """Who goes from host RAM to disk when a freeze needs the room, or is going to."""

    def choose(self, cold: Iterable[Cold], missing_bytes: int) -> tuple[str, ...] | None:
        """Those whose going frees ``missing_bytes``, in the order in which they should go; None if none do."""
        ...


def ahead_of_need(
    policy: DiskPolicy,
    cold: Sequence[Cold],
    *,
    used_bytes: int,
    budget_bytes: int,
    reserve_bytes: int,
) -> str | None:
    """Who is to go first so that ``reserve_bytes`` of the budget are free; None when they are, or nobody can go."""
    missing = used_bytes + reserve_bytes - budget_bytes
    if missing <= 0:
        return None
    chosen = policy.choose(cold, min(missing, sum(each.ram_bytes for each in cold)))
    return chosen[0] if chosen else None


class LeastRecentlyUsed:
    """The fewest of those that have been idle longest."""

    def choose(self, cold: Iterable[Cold], missing_bytes: int) -> tuple[str, ...] | None:
        chosen: list[str] = []
        for each in sorted(cold, key=lambda c: (c.last_used_unix_s, c.tree_id)):
            if missing_bytes <= 0:
                break
            if each.ram_bytes > 0:
                chosen.append(each.tree_id)
                missing_bytes -= each.ram_bytes
        return tuple(chosen) if missing_bytes <= 0 else None
