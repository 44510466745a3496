"""/proc for the supervisor of a tree: few imports, and pids as its own namespace counts them. See also ``proc.py``."""

# ruff: noqa: PTH208
from __future__ import annotations

import contextlib
import os
import signal


def read_stat(pid: int | str, proc: int | None = None) -> tuple[bytes, int, int, int]:
    """(state, parent, start ticks, owner). The name before them may hold anything, also ``)``. Raises OSError.

    ``proc``: a descriptor of another /proc than the one that is mounted.
    """
    path = f"{pid}/stat" if proc is not None else f"/proc/{pid}/stat"
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        fields = os.read(fd, 1024).rpartition(b")")[2].split()
        return fields[0], int(fields[1]), int(fields[19]), os.fstat(fd).st_uid
    finally:
        os.close(fd)


def all_processes() -> dict[int, tuple[bytes, int, int, int]]:
    """What ``read_stat`` says of every process that is there, from one look."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry)] = read_stat(entry)
    return found


def descendants(root: int) -> list[tuple[int, int, bool, int]]:
    """(pid, start ticks, stopped, owner) of all below ``root``, from one look at /proc; see also ``proc.py``."""
    children: dict[int, list[tuple[int, int, bool, int]]] = {}
    for pid, (state, parent, ticks, owner) in all_processes().items():
        children.setdefault(parent, []).append((pid, ticks, state == b"T", owner))
    below = list(children.get(root, ()))
    for process in below:  # grows while it is read
        below.extend(children.get(process[0], ()))
    return below


def guests() -> list[int]:
    """Processes that somebody outside has put into this namespace: CRIU at work, a shell of the administrator's."""
    return [pid for pid, (_, parent, _, _) in all_processes().items() if parent == 0 and pid != 1]


def reap() -> bool:
    """Reaps without waiting. False: no child is left, and so, for a subreaper, no descendant."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def send_signal(pid: int, ticks: int, number: int) -> None:
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if read_stat(pid)[2] == ticks:
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def write_file(path: str, text: str) -> None:
    """One write to a file of the kernel's; where it is refused, things go on without."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
