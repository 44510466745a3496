"""A first process for namespaces in tests: ``unshare --pid --mount --fork python -I -S tiny_init.py [LOG UID CMD...]``.

Gives the namespaces a /proc and a /dev/shm of their own, starts the command (if any) as pid 1000 with its output in
LOG, opened inside, and reaps for ever. Writes ``ready`` to its standard output, then lets go of what it was given.
"""

# ruff: noqa: PTH123
from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
MS_REC_SLAVE = 0x4000 | 1 << 19


def main() -> None:
    log, uid, argv = sys.argv[1:2], int((sys.argv[2:3] or ["0"])[0]), sys.argv[3:]
    mount(None, "/", None, MS_REC_SLAVE)
    mount("proc", "/proc", "proc", MS_NOSUID_NODEV_NOEXEC)
    mount("tmpfs", "/dev/shm", "tmpfs", 2 | 4)
    ready = os.dup(1)
    os.set_inheritable(ready, False)
    for fd in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), fd)
    for fd in range(3, 256):  # whatever the caller forgot to close would be from outside
        if fd != ready:
            with contextlib.suppress(OSError):
                os.close(fd)
    os.chdir("/")
    if argv:
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write("999")
        if os.fork() == 0:
            become(argv, log[0], uid)
    os.write(ready, b"ready")
    os.close(ready)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def become(argv: list[str], log: str, uid: int) -> None:
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    if uid:
        os.chown(log, uid, uid)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    os.execv(argv[0], argv)


def mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    if libc.mount(*encoded, flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")


main()
