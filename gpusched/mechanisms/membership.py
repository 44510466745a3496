"""Who belongs to a tree, and who of them is halted: from /proc and the tree's control group.

Covers: the steps of ``TreeKeeper.members`` and ``locate``. All of it blocks, for microseconds a process, and hostile
trees are large: what is linear here must stay so.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from gpusched.mechanisms import cgroups, proc
from gpusched.ports import Member

#: A tree that forks faster than we read is not waited for.
_MAX_GROUP_READS = 50


def walk_up(
    pid: int, roots: Mapping[tuple[int, int], str], walked: dict[int, str | None]
) -> str | None:
    """What ``roots``, by pid and start time, says of the process or of its nearest ancestor that is in it.

    ``walked`` holds what earlier walks found, so that all of a long chain costs no more than its end.
    """
    way: list[int] = []
    tree_id: str | None = None
    while stat := proc.read_stat(pid):
        if (tree_id := roots.get((pid, stat.start_ticks)) or walked.get(pid)) is not None:
            break
        if pid in walked and way:
            break
        way.append(pid)
        pid = stat.ppid
    walked.update(dict.fromkeys(way, tree_id))
    return tree_id


def family(roots: Set[int], *, listed: bool) -> dict[int, proc.Stat]:
    """``roots`` and all below them. ``listed``: the kernel lists children; else it takes a look at every process."""
    if listed:
        return proc.descend(roots)
    table = proc.scan()
    return {pid: stat for pid in table.descendants(roots) if (stat := table.get(pid))}


def read_again(stats: Mapping[int, proc.Stat]) -> dict[int, proc.Stat]:
    """The same processes as they are now, less those that are gone."""
    now = {pid: proc.read_stat(pid) for pid in stats}
    return {
        pid: stat
        for pid, stat in now.items()
        if stat and stat.start_ticks == stats[pid].start_ticks
    }


def add_group(stats: dict[int, proc.Stat], group: Path) -> None:
    """Adds the members of a group, until it has no new ones: then every child of a stopped member is there."""
    known = set(stats)
    for _ in range(_MAX_GROUP_READS):
        new = [pid for pid in cgroups.pids(group) if pid not in known]
        if not new:
            return
        known.update(new)
        stats.update((pid, stat) for pid in new if (stat := proc.read_stat(pid)))


def halted(stats: Mapping[int, proc.Stat]) -> set[int]:
    """Those that execute nothing: stopped, or waiting in vfork for a child that is halted itself."""
    halted = {pid for pid, stat in stats.items() if stat.is_stopped}
    waiting = {p for p, stat in stats.items() if stat.state == "D" and proc.waits_in_vfork(p)}
    for pid in list(halted):
        while (pid := stats[pid].ppid) in waiting:  # which may itself be a vfork child
            halted.add(pid)
            waiting.discard(pid)
    return halted


def member(stat: proc.Stat, stopped: bool) -> Member | None:
    """None for what is gone or a zombie."""
    ruid = proc.ruid(stat.pid) if stat.is_alive else None
    if ruid is None:
        return None
    return Member(
        pid=stat.pid,
        start_ticks=stat.start_ticks,
        ruid=ruid,
        stopped=stopped,
    )
