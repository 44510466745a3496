"""The namespaces of one tree, seen from the host through their first process.

Covers: holding them open, who lives in them, opening files as the tree sees them, and starting a program in them.
Does not cover: making them. Blocking, for microseconds a process of the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import stat
import struct
import subprocess
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import IO, Final, NamedTuple, Self

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.ports import Identity

#: What a tree may have of its own, in the order in which it is entered, with nsenter's option.
_KINDS: Final = ("ipc", "uts", "net", "pid", "mnt")
_OPTIONS: Final = {"mnt": "--mount"}
_SYS_OPENAT2: Final = 437  # on every architecture
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x02, 0x04, 0x10
_MARK: Final = "GPUSCHED_INSIDE"
_libc = ctypes.CDLL(None, use_errno=True)


class Task(NamedTuple):
    """One process of a tree. ``pid`` and ``parent`` are the host's, ``inner_pid`` is the one inside."""

    pid: int
    parent: int
    inner_pid: int
    start_ticks: int
    state: str  # as in /proc/PID/stat

    @property
    def is_stopped(self) -> bool:
        return self.state == "T"


class Inside:
    """Open namespaces: they last as long as this does, even when their processes have ended.

    Raises NotFound when the first process is gone, Unsupported when it has no PID and mount namespace of its own.
    """

    def __init__(self, init: Identity) -> None:
        self.init = init
        self._fds = contextlib.ExitStack()
        try:
            self._directory = self._open(f"/proc/{init.pid}", os.O_RDONLY | os.O_DIRECTORY)
            first = proc.read_stat(init.pid)
            if first is None or first.start_ticks != init.start_ticks or not first.is_alive:
                raise errors.NotFound(f"no process {init.pid} is the first of a tree any more")
            # What is opened below the directory belongs to that process or cannot be opened.
            self._namespaces = {kind: fd for kind in _KINDS if (fd := self._own(kind)) is not None}
            if not {"pid", "mnt"} <= set(self._namespaces):
                raise errors.Unsupported(
                    f"process {init.pid} has no namespaces of its own, so nothing in it can be saved to disk"
                )
            self.root = self._open("root", os.O_PATH | os.O_DIRECTORY, self._directory)
        except OSError as error:
            self.close()
            raise errors.NotFound(f"the namespaces of process {init.pid}: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._fds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, path: str, flags: int, directory: int | None = None) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, dir_fd=directory)
        self._fds.callback(os.close, fd)
        return fd

    def _own(self, kind: str) -> int | None:
        """None where the tree shares ours."""
        fd = self._open(f"ns/{kind}", os.O_RDONLY, self._directory)
        return None if os.path.samestat(os.fstat(fd), os.stat(f"/proc/self/ns/{kind}")) else fd  # noqa: PTH116

    # -- who is there -----------------------------------------------------------------------------

    def tasks(self) -> list[Task]:
        """Everything below the first process, by their pids inside; zombies and guests are left out."""
        table = proc.scan()
        below = table.descendants([self.init.pid]) - {self.init.pid}
        found = [_task(one) for pid in below if (one := table.get(pid)) and one.is_alive]
        return sorted((task for task in found if task), key=lambda task: task.inner_pid)

    def everybody(self) -> list[int]:
        """Host pids of all processes in the PID namespace but the first: also those that entered it."""
        return [pid for pid in processes_in(self.pid_namespace) if pid != self.init.pid]

    @property
    def pid_namespace(self) -> tuple[int, int]:
        """(device, inode): the same for all processes in it."""
        found = os.fstat(self._namespaces["pid"])
        return found.st_dev, found.st_ino

    def find(self, inner_pid: int) -> Task | None:
        """The process with that pid inside; None when there is none."""
        return next((task for task in self.tasks() if task.inner_pid == inner_pid), None)

    @property
    def network_namespace(self) -> int | None:
        """A descriptor of it; None where the tree shares ours."""
        return self._namespaces.get("net")

    @property
    def mount_namespace(self) -> int:
        """A descriptor of it."""
        return self._namespaces["mnt"]

    @property
    def mark(self) -> str:
        """What is in the environment of everything that was started in these namespaces from outside."""
        device, inode = self.pid_namespace
        return f"{device}:{inode}"

    def guests(self, executable: str) -> list[int]:
        """Who works in here without being of the tree: what ``start`` has started, and all with that executable.

        Also what an earlier daemon started and does not know of any more. Only root's processes are believed.
        """
        mark = f"{_MARK}={self.mark}".encode()
        found = {pid for pid in all_pids() if _is_roots(pid) and _has_in_environ(pid, mark)}
        with contextlib.suppress(FileNotFoundError):
            wanted = os.stat(executable)  # noqa: PTH116
            here = (pid for pid in self.everybody() if _is_roots(pid))
            found |= {pid for pid in here if _executes(pid, wanted)}
        return sorted(found)

    # -- what it sees -----------------------------------------------------------------------------

    def open(self, path: str, flags: int, mode: int = 0, *, resolve: int = 0) -> int:
        """Opens an absolute path as the tree sees it: also symbolic links stay in its mount namespace. OSError."""
        how = struct.pack(
            "=QQQ", flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve
        )
        fd: int = _libc.syscall(
            _SYS_OPENAT2, self.root, ctypes.c_char_p(os.fsencode(path)), how, len(how)
        )
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return fd

    # -- starting a program in it -----------------------------------------------------------------

    def start(
        self,
        argv: Sequence[str],
        *,
        output: IO[bytes],
        pass_fds: Iterable[int] = (),
        oom_score: int = 0,
    ) -> subprocess.Popen[bytes]:
        """Starts a program in all namespaces of the tree, below a process of ours that ends as it ends.

        It is not of the tree: the tree's first process is not its parent. ``oom_score``: its oom_score_adj, as far as
        we may set that. Raises OSError.
        """
        if (nsenter := shutil.which("nsenter")) is None:
            raise FileNotFoundError(errno.ENOENT, "nsenter (util-linux) is missing")
        # Before nsenter forks: afterwards its child has the old score already.
        scored = f'{{ echo {oom_score} >/proc/self/oom_score_adj; }} 2>/dev/null; exec "$@"'
        options = [
            f"{_OPTIONS.get(kind, f'--{kind}')}=/proc/self/fd/{fd}"
            for kind, fd in self._namespaces.items()
        ]
        return subprocess.Popen(
            ["/bin/sh", "-c", scored, "sh", nsenter, *options, "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(*self._namespaces.values(), *pass_fds),
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", _MARK: self.mark},
            cwd="/",
            umask=0o077,
            start_new_session=True,
        )


def open_log(inside: Inside, path: str, uid: int, gid: int) -> int:
    """Opens a log for a tree to write to, inside its namespaces; made where there is none. Raises OSError.

    One that is there must be a plain file of the user's: in a directory of theirs anything may lie.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = inside.open(path, flags | os.O_EXCL, 0o600)
        os.fchown(fd, uid, gid)
    except FileExistsError:
        fd = inside.open(path, flags & ~os.O_CREAT)
        found = os.fstat(fd)
        if found.st_uid != uid or not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            os.close(fd)
            raise OSError(errno.EEXIST, "is there and not a file of the user's", path) from None
    os.set_blocking(fd, True)
    return fd


def processes_in(pid_namespace: tuple[int, int]) -> list[int]:
    """Host pids of all live processes in a PID namespace."""
    found = []
    for pid in all_pids():
        with contextlib.suppress(OSError):
            link = os.stat(f"/proc/{pid}/ns/pid")  # noqa: PTH116 - hundreds of them
            if (link.st_dev, link.st_ino) == pid_namespace:
                found.append(pid)
    return found


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name[0] in "123456789"]  # noqa: PTH208


def send(pid: int, start_ticks: int | None, number: int) -> bool:
    """Signals by pidfd, after checking the start time where one is given. False: no such process."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        found = proc.read_stat(pid)
        if found is None or start_ticks not in (None, found.start_ticks):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def _is_roots(pid: int) -> bool:
    return proc.ruid(pid) == 0


def _executes(pid: int, wanted: os.stat_result) -> bool:
    """By the file, never by a name or a command line: those anybody may imitate."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(f"/proc/{pid}/exe"), wanted)  # noqa: PTH116
    return False


def _has_in_environ(pid: int, entry: bytes) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
        return entry in file.read(65536).split(b"\0")
    return False


def _task(found: proc.Stat) -> Task | None:
    inner = proc.inner_pid(found.pid)
    return (
        None
        if inner is None
        else Task(found.pid, found.ppid, inner, found.start_ticks, found.state)
    )
