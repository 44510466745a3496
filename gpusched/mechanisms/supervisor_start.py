"""How the supervisor of a tree begins it: a new command, or the processes that CRIU brings back.

Covers: the command's log, user, directory and environment; failures on the way; who is the main process. Does not
cover: the supervisor's own life (``supervisor.py``). Standard library only, and little of it.
"""

# ruff: noqa: PTH104, PTH108, PTH109, PTH119
from __future__ import annotations

import contextlib
import errno
import marshal
import os
import select
import signal
import stat
import sys

from gpusched.mechanisms import namespaces
from gpusched.mechanisms.bare_proc import descendants, read_stat, reap, write_file

#: How often children that have ended are looked for while CRIU makes others.
_REAP_S = 0.02


class Task:
    """What to start; the fields are those of ``ports.Launch``. (A dataclass would cost 10 ms of imports.)

    ``binds`` is None for a tree in the host's own namespaces. ``revive``: CRIU brings the processes back, and the
    supervisor only waits for it; ``fresh_log``: into a new log, as for a command.
    """

    argv: list[str]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    groups: list[int]
    log_path: str
    cgroup: str | None
    boot_id: str
    binds: list[tuple[str, str]] | None
    own_network: bool
    revive: bool
    fresh_log: bool

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


class StartFailed(Exception):
    """The command was not started. Its arguments are the report: the stage, the errno or 0, the reason."""

    @classmethod
    def at(cls, stage: str, error: BaseException) -> StartFailed:
        number = error.errno if isinstance(error, OSError) and error.errno else 0
        return cls(stage, number, os.strerror(number) if number else str(error))


def start(task: Task, host_proc: int | None) -> tuple[int, tuple[int, int]]:
    """Runs the command. Returns its pid and (host pid, start ticks). On StartFailed nothing of it is left."""
    new_log = f"{task.log_path}.{os.path.basename(os.getcwd())}"
    log_fd = create_log(task, new_log)
    go_read, go_write = os.pipe()
    status_read, status_write = os.pipe()
    pid = 0
    try:
        if host_proc is not None:
            namespaces.next_pid(namespaces.MAIN_PID)
        pid = os.fork()
        if pid == 0:
            become_command(task, log_fd, go_read, status_write)
        for fd in (log_fd, go_read, status_write):
            os.close(fd)
        identity = record_main(task, pid, host_proc)
        with contextlib.suppress(BrokenPipeError):  # it failed already; the status pipe says how
            os.write(go_write, b"g")
        os.close(go_write)
        failed = os.read(status_read, 65536)  # the end of file comes with a successful execve
        os.close(status_read)
        if failed:
            raise StartFailed(*marshal.loads(failed))  # noqa: S302 - from our own child
    except BaseException:
        if pid:  # not reaped, so the pid is still our child's
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for path in (new_log, "started.json"):
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    if task.log_path != os.devnull:
        keep_previous_log(task.log_path, new_log)
    return pid, identity


def record_main(task: Task, pid: int, host_proc: int | None) -> tuple[int, int]:
    """Writes started.json, with what the host calls the main process; returns that."""
    seen = pid if host_proc is None else namespaces.host_pid(pid, host_proc)
    ticks = read_stat(pid)[2]
    write_record("started.json", identity_record(seen, ticks, task.boot_id))
    return seen, ticks


# -- bringing back --------------------------------------------------------------------------------


def revive(task: Task, go_fd: int, host_proc: int) -> tuple[int, tuple[int, int]]:
    """Waits until CRIU has brought the processes back, and becomes their parent in earnest.

    The daemon says through ``go_fd`` which pid the main process has here. It says nothing when CRIU failed, and
    cannot when it was killed: then StartFailed, and the end of this process ends everything in its namespace, of
    which the image holds another copy.
    """
    while not select.select([go_fd], (), (), _REAP_S)[0]:
        reap()  # what CRIU made and gave up is ours to bury, else it waits for that
    said = os.read(go_fd, 32)
    os.close(go_fd)
    if not said:
        raise StartFailed("revive", 0, "the processes were not brought back")
    pid = int(said)
    try:
        parent = read_stat(pid)[1]
    except OSError as error:
        raise StartFailed("revive", 0, f"pid {pid} ended as it came back") from error
    if parent != os.getpid():
        raise StartFailed("revive", 0, f"pid {pid} has another parent")
    if task.cgroup:
        for member, _, _, _ in descendants(os.getpid()):
            write_file(f"{task.cgroup}/cgroup.procs", str(member))
    return pid, record_main(task, pid, host_proc)


def open_log(task: Task) -> None:
    """Sees to it that what is brought back finds its log: the one that it had, or a new one. Raises StartFailed."""
    if task.log_path == os.devnull:
        return
    if task.fresh_log:
        new_log = f"{task.log_path}.{os.path.basename(os.getcwd())}"
        os.close(create_log(task, new_log))
        keep_previous_log(task.log_path, new_log)
        return
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(task.log_path, flags)
    except FileNotFoundError:
        os.close(create_log(task, task.log_path))
        return
    except OSError as error:
        raise StartFailed.at("log", error) from error
    found = os.fstat(fd)
    os.close(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != task.uid:
        raise StartFailed("log", errno.EEXIST, "it is not the process's own log any more")


# -- the command ----------------------------------------------------------------------------------


def create_log(task: Task, path: str) -> int:
    """A fresh file of the user's, for their eyes only, under a name that it keeps only if the start succeeds.

    Opened here, not by the daemon: CRIU cannot save a descriptor from outside the tree's mount namespace.
    """
    try:
        if task.log_path == os.devnull:
            return os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(task.log_path).st_mode):
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_APPEND
        fd = os.open(path, flags, 0o600)
        if os.geteuid() == 0:
            os.fchown(fd, task.uid, task.gid)
    except OSError as error:
        raise StartFailed.at("log", error) from error
    return fd


def keep_previous_log(path: str, new: str) -> None:
    """The command runs already, so a failure here is noted (supervisor.log) and changes nothing."""
    try:
        with contextlib.suppress(FileNotFoundError):
            owner, previous = os.lstat(path).st_uid, f"{path}.1"
            if os.path.lexists(previous) and os.lstat(previous).st_uid != owner:
                previous += f".{owner}"  # that one is another user's, who had the name before
            os.rename(path, previous)
        os.rename(new, path)
    except OSError as error:
        complain(f"log stays at {new}: {error}")


def become_command(task: Task, log_fd: int, go_fd: int, status_fd: int) -> None:
    """In the forked child: gives up everything that is not the command's, then becomes it. Never returns."""
    stage = "supervisor"
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        low, high = sorted((go_fd, status_fd))
        os.closerange(3, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, 1 << 20)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        os.umask(0o022)
        if os.geteuid() == 0:
            write_file("/proc/self/oom_score_adj", "0")
        if task.cgroup:
            write_file(f"{task.cgroup}/cgroup.procs", "0")
        stage = "user"
        drop_privileges(task)
        stage = "chdir"
        os.chdir(task.cwd)
        if os.read(go_fd, 1):
            stage = "exec"
            execute(task.argv, task.env)
    except BaseException as error:  # noqa: BLE001 - a child that fails must not go on as the supervisor
        os.write(status_fd, marshal.dumps(StartFailed.at(stage, error).args))
    finally:
        os._exit(127)


def drop_privileges(task: Task) -> None:
    if os.geteuid() != 0:
        if task.uid != os.geteuid():
            raise PermissionError(errno.EPERM, "only root can start processes of other users")
        return
    os.setgroups(task.groups)
    os.setresgid(task.gid, task.gid, task.gid)
    os.setresuid(task.uid, task.uid, task.uid)
    if (
        os.getresuid() != (task.uid,) * 3
        or os.getresgid() != (task.gid,) * 3
        or set(os.getgroups()) != set(task.groups)
    ):
        raise PermissionError(errno.EPERM, "the kernel did not change the user")


def execute(argv: list[str], env: dict[str, str]) -> None:
    """Like execvpe, with PATH from ``env``; ``os.execvpe`` imports a module here, where we are the user already."""
    if "/" in argv[0]:
        os.execve(argv[0], argv, env)  # noqa: S606 - running a command is the point
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in env.get("PATH", os.defpath).split(":"):
        try:
            os.execve(f"{directory or '.'}/{argv[0]}", argv, env)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            failure = error  # like a shell: a later directory may have a better one
    raise failure


# -- records --------------------------------------------------------------------------------------


def identity_record(pid: int, ticks: int, boot_id: str) -> bytes:
    return f'{{"pid": {pid}, "start_ticks": {ticks}, "boot_id": "{boot_id}"}}'.encode()


def write_record(name: str, text: bytes) -> None:
    """Whole or not at all. Not synced: a record of a running process means nothing after a power failure."""
    fd = os.open(f"{name}.part", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    os.write(fd, text)
    os.close(fd)
    os.rename(f"{name}.part", name)


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - into supervisor.log
