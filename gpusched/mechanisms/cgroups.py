"""Control groups: a group of its own for each tree, so that no descendant can be missed.

Covers: finding where groups are mounted and which one a process is in; making, reading and removing the group of a
tree. Does not cover: memory limits (``host.py``); joining, which the supervisor's child does itself.

The group has no controllers: it is a list of members that the kernel keeps, and nothing else. Where there is no
version 2 hierarchy, or it may not be written, trees live without: every failure here means "no group".
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of /proc/self/mountinfo. ``root`` is the part of the hierarchy that is seen at ``point``."""

    root: str
    point: Path
    fstype: str
    options: frozenset[str]

    def directory(self, group: str) -> Path | None:
        """Where the group with this name (as /proc/PID/cgroup has it) is; None when it is outside the mount."""
        root = self.root.rstrip("/")
        if ".." in group.split("/") or not f"{group}/".startswith(f"{root}/"):
            return None
        return self.point / group[len(root) :].strip("/")


def mounts(proc: Path = Path("/proc")) -> list[Mount]:
    """The cgroup mounts that this process sees."""
    found = []
    for line in (proc / "self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (fstype, _source, *options) = left.split(), right.split()
        if fstype in {"cgroup", "cgroup2"}:
            root, point = (_OCTAL.sub(lambda m: chr(int(m[1], 8)), text) for text in fields[3:5])
            found.append(
                Mount(
                    root=root,
                    point=Path(point),
                    fstype=fstype,
                    options=frozenset(",".join(options).split(",")),
                )
            )
    return found


def groups_of(pid: int | str, proc: Path = Path("/proc")) -> dict[str, str]:
    """Controller -> group of a process; the version 2 hierarchy has the empty name. Raises OSError."""
    found = {}
    for line in (proc / str(pid) / "cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), group))
    return found


class TreeGroups:
    """Where the groups of trees are: below the group that this process is in."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._mount, self._parent = _own_group() if enabled else (None, None)

    def path_for(self, tree_id: str) -> Path | None:
        """Where the group of a tree will be; None where there are no groups."""
        return self._parent / f"gpusched-{tree_id}" if self._parent else None

    def of(self, pid: int) -> Path | None:
        """The group that a process is in; None when it is gone or there are no groups."""
        try:
            group = groups_of(pid).get("")
        except (OSError, ValueError):
            return None
        return self._mount.directory(group) if self._mount and group else None


def _own_group() -> tuple[Mount | None, Path | None]:
    """A version 2 mount in which this process's own group can be seen, and that group."""
    try:
        group = groups_of("self").get("")
        for mount in mounts():
            directory = mount.directory(group) if group and mount.fstype == "cgroup2" else None
            if directory is not None and (directory / "cgroup.procs").exists():
                return mount, directory
    except (OSError, ValueError) as error:
        logger.debug("no cgroups reason=%s", error)
    return None, None


def create(path: Path) -> bool:
    """Whether there is a new group now."""
    try:
        path.mkdir(mode=0o755)
    except OSError as error:
        logger.debug("no cgroup path=%s reason=%s", path, error)
        return False
    return True


def pids(path: Path) -> list[int]:
    """The processes of a group; empty when it cannot be read."""
    parts = []
    try:
        fd = os.open(
            f"{path}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC
        )  # a third of what open() costs
        try:
            while part := os.read(fd, 65536):
                parts.append(part)
        finally:
            os.close(fd)
    except OSError:
        return []
    return [int(pid) for pid in b"".join(parts).split()]


def remove(path: Path) -> None:
    """Best effort: a group that still has members, or is gone, stays as it is."""
    with contextlib.suppress(OSError):
        path.rmdir()
