"""What makes a tree's own view of the host: namespaces, a private /proc, a private /dev/shm, pids from 1000 on.

Covers: the system calls, for the init of a tree (``supervisor.py``), which loads this with nothing but the standard
library. Does not cover: when a tree gets namespaces (``trees.py``) and what CRIU does inside them.

All of it blocks, for microseconds, and raises OSError.
"""

# ruff: noqa: PTH103, PTH112
from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_SLAVE = 2, 4, 8, 4096, 16384, 1 << 19
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
#: The pid of every main process inside its namespace. CRIU's own pids, which are low, can never be in its way.
MAIN_PID = 1000
SHM = "/dev/shm"  # noqa: S108 - this mount point, not a file in it

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(*, network: bool) -> None:
    """A mount namespace for the caller, and a PID namespace for its next child, which becomes its init.

    ``network``: that child is alone in a network namespace too, with nothing but ``lo``.
    """
    flags = CLONE_NEWNS | CLONE_NEWPID | (CLONE_NEWNET if network else 0)
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = (
        None if text is None else os.fsencode(text) for text in (source, target, kind, data)
    )
    source_, target_, kind_, data_ = arguments
    result = _libc.mount(source_, target_, kind_, ctypes.c_ulong(flags), data_)
    _checked(result, f"mount {target}")


def settle(binds: list[tuple[str, str]]) -> int:
    """Makes the private /proc and /dev/shm, in the first process of the namespaces; returns the host's /proc.

    ``binds``: directories of the host, and where the tree is to see them; made where they are missing. The host's
    later mounts and unmounts show here too, not the other way round. The descriptor of the host's /proc is for
    ``host_pid``; nobody below may get it.
    """
    host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    mount("none", "/", None, MS_REC | MS_SLAVE)
    # Opened before anything is covered.
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    sources = [os.open(source, flags) for source, _ in binds]
    if os.path.isdir(SHM):
        size = os.statvfs(SHM)
        limit = f",size={size.f_blocks * size.f_frsize}" if size.f_blocks else ""
        mount("tmpfs", SHM, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777{limit}")
    for source, (_, target) in zip(sources, binds, strict=True):
        os.makedirs(target, mode=0o755, exist_ok=True)
        mount(f"/proc/self/fd/{source}", target, None, MS_BIND)
        os.close(source)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    return host_proc


def next_pid(pid: int) -> None:
    """The next process of this namespace gets ``pid``, or the first free one after it."""
    fd = os.open("/proc/sys/kernel/ns_last_pid", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % (pid - 1))
    finally:
        os.close(fd)


def host_pid(pid: int, host_proc: int) -> int:
    """What the host calls a process of this namespace: a pidfd says it, in the words of the /proc where one looks."""
    pidfd = os.pidfd_open(pid)
    try:
        fd = os.open(f"self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=host_proc)
        try:
            lines = os.read(fd, 4096).splitlines()
        finally:
            os.close(fd)
    finally:
        os.close(pidfd)
    found = [int(line.split()[1]) for line in lines if line.startswith(b"Pid:")]
    if not found or found[0] <= 0:
        raise ProcessLookupError(f"no pid {pid} in this namespace")
    return found[0]


def raise_loopback() -> None:
    """Brings ``lo`` up; CRIU itself needs it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack_from("16xH", fcntl.ioctl(anything, SIOCGIFFLAGS, request))[0]
        fcntl.ioctl(anything, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))
