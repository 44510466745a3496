"""Reading processes from /proc: who they are, whose children, whether they stopped.

Covers: one process (``read_stat``, ``identify``, ``ruid``, ``environ``), a family (``descend``), all (``scan``).
Does not cover: trees with a supervisor (``trees.py``). Everything here blocks, for microseconds a process: the files
are made by the kernel when they are read. A process that vanishes in the middle gives None or is left out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from gpusched import errors
from gpusched.ports import Identity

#: Where the kernel waits for a vfork child; the name depends on its version.
_VFORK = frozenset({b"kernel_clone", b"_do_fork", b"wait_for_vfork_done"})
#: A host where something is born in every single pass is not waited for.
_MAX_PASSES = 5
#: The kernel starts no program with more arguments and environment than this (three quarters of 8 MiB).
MAX_ENVIRON_BYTES: Final = 6 * 1024 * 1024


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that we use. (A NamedTuple: one is made for every process of the host.)"""

    pid: int
    state: str  # R S D T t Z X I
    ppid: int
    threads: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """A main thread may end before the others: a zombie with more threads than itself still runs."""
        return self.state not in "ZX" or self.threads > 1

    @property
    def is_stopped(self) -> bool:
        """Halted by a signal (T) or by a debugger (t)."""
        return self.state in "Tt"


def _read(path: str) -> bytes:
    """At most 4 KiB of a file of the kernel's. ``open()`` would cost three times as much."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _parse(pid: int, text: bytes) -> Stat:
    # The command name (field 2) is in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(b")") + 2 :].split(None, 20)
    return Stat(pid, chr(fields[0][0]), int(fields[1]), int(fields[17]), int(fields[19]))


def read_stat(pid: int) -> Stat | None:
    """None when there is no such process."""
    try:
        return _parse(pid, _read(f"/proc/{pid}/stat"))
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def identify(pid: int) -> Identity:
    """Raises NotFound when no such process runs; a zombie and the id of a mere thread are no process."""
    stat = read_stat(pid) if pid > 0 else None
    if stat is None or not stat.is_alive or not _is_process(pid):
        raise errors.NotFound(f"no process with pid {pid} is running", {"pid": pid})
    return Identity(pid=pid, start_ticks=stat.start_ticks, boot_id=boot_id())


def _is_process(pid: int) -> bool:
    """/proc/TID exists for every thread; only a process has itself as thread group."""
    return _status_field(pid, b"Tgid:") == pid


def ruid(pid: int) -> int | None:
    """The real uid. None when there is no such process."""
    return _status_field(pid, b"Uid:")


def inner_pid(pid: int) -> int | None:
    """The pid that a process has in its own (innermost) PID namespace. None when there is no such process."""
    try:
        return int(_status_line(pid, b"NSpid:").split()[-1])
    except (OSError, ValueError, IndexError):
        return None


def _status_field(pid: int, name: bytes) -> int | None:
    """The first number of a line of /proc/PID/status."""
    try:
        return int(_status_line(pid, name).split(None, 1)[0])
    except (OSError, ValueError, IndexError):
        return None


def _status_line(pid: int, name: bytes) -> bytes:
    """What follows the name in /proc/PID/status. Raises OSError, ValueError."""
    text = _read(f"/proc/{pid}/status")
    begin = text.index(b"\n" + name) + len(name) + 1
    return text[begin : text.index(b"\n", begin)]


def has_capability(number: int) -> bool:
    """Whether this process has it in effect."""
    try:
        return bool(int(_status_line(os.getpid(), b"CapEff:"), 16) >> number & 1)
    except (OSError, ValueError):
        return False


def waits_in_vfork(pid: int) -> bool:
    """Whether a process does nothing but wait for a vfork child: each thread is in vfork, or stopped.

    Such a wait is deaf to SIGSTOP: while the child is stopped before its exec, the parent stays in state D.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
        states = [(_parse(pid, _read(f"/proc/{pid}/task/{t}/stat")), t) for t in threads]
        return bool(states) and all(
            s.is_stopped or (s.state == "D" and _read(f"/proc/{pid}/task/{t}/wchan") in _VFORK)
            for s, t in states
        )
    except (OSError, ValueError, IndexError):
        return False


def environ(pid: int) -> dict[str, str]:
    """The environment that the process was started with. Raises OSError (gone, or not ours to read)."""
    with Path(f"/proc/{pid}/environ").open("rb") as file:
        entries = file.read(MAX_ENVIRON_BYTES).split(b"\0")
    pairs = (entry.partition(b"=") for entry in entries if b"=" in entry)
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs}


class Table:
    """Every process of the host, as one look at /proc showed it."""

    __slots__ = ("_children", "_stats")

    def __init__(self, stats: dict[int, Stat]) -> None:
        self._stats = stats
        self._children: dict[int, list[int]] = {}
        for stat in stats.values():
            self._children.setdefault(stat.ppid, []).append(stat.pid)

    def __len__(self) -> int:
        return len(self._stats)

    def get(self, pid: int) -> Stat | None:
        return self._stats.get(pid)

    def descendants(self, roots: Iterable[int]) -> set[int]:
        """The pids of ``roots`` and of all below them, dead or alive."""
        found = set(roots)
        queue = list(found)
        for pid in queue:  # grows while it is read
            new = [child for child in self._children.get(pid, ()) if child not in found]
            found.update(new)
            queue.extend(new)
        return found


def all_pids() -> list[int]:
    # names, not hundreds of Path objects
    return [int(name) for name in os.listdir("/proc") if name[0] in "123456789"]  # noqa: PTH208


def scan() -> Table:
    """Looks at all processes: 11 us each.

    Looks again for what was born meanwhile, until nothing new is there: so a child of a process that is seen
    stopped is seen too. A process whose parent ended while we looked is read once more: by then it has a new one.
    """
    table: dict[int, Stat] = {}
    for _ in range(_MAX_PASSES):
        born = [stat for pid in all_pids() if pid not in table and (stat := read_stat(pid))]
        if not born:
            break
        table.update((stat.pid, stat) for stat in born)
    for stat in [s for s in table.values() if s.ppid and s.ppid not in table]:
        again = read_stat(stat.pid)
        if again is None:
            del table[stat.pid]
        else:
            table[stat.pid] = again
    return Table(table)


def lists_children() -> bool:
    """Whether this kernel lists the children of a thread (CONFIG_PROC_CHILDREN, which CRIU needs too)."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # noqa: PTH110


def _children(pid: int) -> list[int]:
    """The children of all threads of a process: 7 us a thread. Empty when it is gone."""
    parts: list[bytes] = []
    try:
        directory = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        for thread in os.listdir(directory):  # noqa: PTH208 - a descriptor, not a path
            with contextlib.suppress(OSError):  # it has ended
                fd = os.open(f"{thread}/children", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
                try:
                    while part := os.read(fd, 65536):
                        parts.append(part)
                finally:
                    os.close(fd)
    finally:
        os.close(directory)
    return [int(word) for word in b"".join(parts).split()]


def descend(roots: Iterable[int]) -> dict[int, Stat]:
    """``roots`` and all below them, dead or alive, at a cost that does not depend on the size of the host.

    Each stat is read before the children, so a child of a process that is seen stopped is seen too. Orphans go to
    an ancestor whose list was read already: it looks again until nothing new is there.
    """
    found: dict[int, Stat] = {}
    for _ in range(_MAX_PASSES):
        known, queue = len(found), list(roots)
        seen = set(queue)
        top = frozenset(queue)
        for pid in queue:  # grows while it is read
            if pid not in found:
                stat = read_stat(pid)
                # A pid that has passed to a stranger meanwhile has a stranger for a parent.
                if stat is None or (pid not in top and stat.ppid not in seen):
                    continue
                found[pid] = stat
            new = [child for child in _children(pid) if child not in seen]
            seen.update(new)
            queue.extend(new)
        if len(found) == known:
            break
    return found


def set_oom_score(pid: int, start_ticks: int, score: int) -> int | None:
    """Sets oom_score_adj and returns the old one; None when it could not be set.

    Everything goes through one descriptor of the process's directory, which cannot turn into another process.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _parse(pid, _read_at(directory, "stat")).start_ticks != start_ticks:
                return None
            old = int(_read_at(directory, "oom_score_adj"))
            if old != score:
                fd = os.open("oom_score_adj", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
                try:
                    os.write(fd, str(score).encode())
                finally:
                    os.close(fd)
            return old
        finally:
            os.close(directory)
    return None


def _read_at(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)
