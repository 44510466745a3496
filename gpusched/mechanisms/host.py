"""How much memory the host can still give, as a whole and within a process's control group.

Covers: ``ports.Host``. Does not cover: budgets and decisions (the engine's). Every call reads a few small files of
the kernel's (tens of microseconds).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpusched.mechanisms import cgroups
from gpusched.mechanisms.cuda import pool as chunks
from gpusched.ports import HostRam
from gpusched.units import KIB

#: Version 1 writes "no limit" as the largest page-aligned number; nothing real comes near.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """The files of one version of the memory controller."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # a line of memory.stat


# Above memory.high a process is throttled to a crawl rather than killed: for a freeze that is as bad.
_V2 = _Names(
    limits=("memory.max", "memory.high"), usage="memory.current", reclaimable="inactive_file"
)
_V1 = _Names(
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    reclaimable="total_inactive_file",
)


class ProcHost:
    """``ports.Host`` from /proc and the control groups. ``proc`` is another root for tests.

    ``pool``: a directory of chunks that belong to us; what they have to spare counts as available.
    """

    def __init__(self, proc: Path = Path("/proc"), pool: Path | None = None) -> None:
        self._proc, self._pool = proc, pool
        self._mounts = cgroups.mounts(proc)

    def ram(self) -> HostRam:
        """MemAvailable: what programs can get without swapping, page cache that can be dropped included."""
        kib = {}
        for line in (self._proc / "meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in {"MemTotal", "MemAvailable"}:
                kib[name] = int(rest.split()[0])
        spare = chunks.spare_bytes(self._pool) if self._pool is not None else 0
        return HostRam(
            total_bytes=kib["MemTotal"] * KIB, available_bytes=kib["MemAvailable"] * KIB + spare
        )

    def cgroup_room_bytes(self, pid: int) -> int | None:
        """The least room on the way from the pid's group to the root; None without a limit, or without the pid."""
        try:
            groups = cgroups.groups_of(pid, self._proc)
        except (OSError, ValueError):
            return None
        rooms = []
        for mount in self._mounts:
            if mount.fstype == "cgroup2":
                names, group = _V2, groups.get("")
            elif "memory" in mount.options:
                names, group = _V1, groups.get("memory")
            else:
                continue
            directory = mount.directory(group) if group else None
            while directory is not None:
                rooms.append(_room_bytes(directory, names))
                directory = directory.parent if directory != mount.point else None
        return min((room for room in rooms if room is not None), default=None)


def _room_bytes(directory: Path, names: _Names) -> int | None:
    """Limit less what is in use and cannot be dropped, at least 0; None without a limit (or a controller)."""
    limits = [limit for name in names.limits if (limit := _number(directory / name)) is not None]
    limit = min(limits, default=_NO_LIMIT_BYTES)
    used = _number(directory / names.usage)
    if limit >= _NO_LIMIT_BYTES or used is None:
        return None
    return max(0, limit - max(0, used - _reclaimable_bytes(directory, names)))


def _reclaimable_bytes(directory: Path, names: _Names) -> int:
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for key, value in map(str.split, lines) if key == names.reclaimable), 0)


def _number(path: Path) -> int | None:
    """None when the file is not there, or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
