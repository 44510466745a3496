"""The host: memory, users, clocks and the durable journal. See the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRam:
    total_bytes: int
    available_bytes: int


class Host(Protocol):
    def ram(self) -> HostRam: ...
    def cgroup_room_bytes(self, pid: int) -> int | None:
        """Bytes until the memory limit of the pid's cgroup (and its parents); None without a limit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """An account as the system knows it; an unknown uid has its number as name and / as home."""

    name: str
    home: str
    shell: str
    groups: tuple[int, ...]


class Users(Protocol):
    async def lookup(self, uid: int, gid: int) -> User:
        """May ask a directory service; never raises for an unknown uid."""
        ...


class Clock(Protocol):
    def monotonic_s(self) -> float: ...
    def unix_s(self) -> float: ...


class Journal(Protocol):
    """Durable memory of the engine: one JSON object a record, in order."""

    async def append(self, *records: Mapping[str, object]) -> None:
        """Returns when the records are on disk (fsync). Raises InsufficientDisk; then nothing was recorded."""
        ...

    async def rewrite(self, records: Iterable[Mapping[str, object]]) -> None:
        """Replaces all records at once, in order with the appends. Raises InsufficientDisk; the old ones stay."""
        ...

    @property
    def size_bytes(self) -> int: ...
