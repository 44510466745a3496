"""The parent of one tree: starts the command, outlives the daemon, records how the command ended.

Covers: becoming a detached subreaper, dropping privileges, starting the command, reporting a failed start, recording
the exit, ending what is left of the tree. Does not cover: deciding anything. The daemon's side is ``trees.py``.

A script of its own, run as ``python -I -S -X utf8 supervisor.py NAME TREE_DIR LOCK_FD REPORT_FD`` with an empty
environment and the task (``marshal``) on standard input. Standard library only, and little of it: every import is
start-up time and memory for each managed process, so no ``json``, ``pathlib``, ``dataclasses`` or ``subprocess``.

    daemon            supervisor                           command
      |- task, lock --->|- fork ----------------------------->|
      |                 |- started.json                       |- user, cgroup, chdir
      |                 |- go ------------------------------->|
      |                 |<-------- errno, or end of file -----|- execve
      |<- report -------|                                     :
      x (may die)       |<-------- exit status ---------------|
                        |- exit.json, then SIGTERM and SIGKILL to the rest of the tree

If the supervisor dies before "go", the command reads the end of the pipe instead and ends without having run.
"""

# ruff: noqa: PTH104, PTH106, PTH108, PTH109, PTH119, PTH208
from __future__ import annotations

import contextlib
import ctypes
import errno
import marshal
import os
import signal
import stat
import sys
import time

PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
#: What the rest of a tree gets between SIGTERM and SIGKILL once its main process has ended.
GRACE_S = 5.0
#: Room for exit.json, taken at the start: a disk that fills up later must not cost the exit status.
EXIT_RECORD_BYTES = 128


class Task:
    """What to start; the fields are those of ``ports.Launch``. (A dataclass would cost 10 ms of imports.)"""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    groups: list[int]
    log_path: str
    cgroup: str | None
    boot_id: str

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


class StartFailed(Exception):
    """The command was not started. Its arguments are the report: the stage, the errno or 0, the reason."""

    @classmethod
    def at(cls, stage: str, error: BaseException) -> StartFailed:
        number = error.errno if isinstance(error, OSError) and error.errno else 0
        return cls(stage, number, os.strerror(number) if number else str(error))


def main() -> None:
    tree, lock_fd, report_fd = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    task = Task(**marshal.load(sys.stdin.buffer))  # noqa: S302 - from the daemon, through a pipe
    if os.fork() == 0:
        os.chdir(tree)
        supervise(task, lock_fd, report_fd)
    # No handler of the interpreter may run twice, and the daemon waits for the first process only.
    os._exit(0)


def supervise(task: Task, lock_fd: int, report_fd: int) -> None:
    """The whole life of the supervisor. ``lock_fd`` stays open, and so locked, until it ends."""
    for fd in (lock_fd, report_fd):
        os.set_inheritable(fd, False)
    detach()
    os.write(lock_fd, identity_record(os.getpid(), task.boot_id))
    try:
        exit_fd = os.open("exit.json.part", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(exit_fd, b" " * EXIT_RECORD_BYTES)
        main_pid, report = start(task)
    except StartFailed as failure:
        send_report(report_fd, failure.args)
        return
    except BaseException as error:
        send_report(report_fd, StartFailed.at("supervisor", error).args)
        raise
    send_report(report_fd, report)
    task.env = {}
    record_exit(exit_fd, await_exit(main_pid))
    end_rest(task)
    if task.cgroup:
        with contextlib.suppress(OSError):
            os.rmdir(task.cgroup)


def detach() -> None:
    """Own session, deaf to every signal that can be ignored, and parent of all orphans below."""
    os.setsid()
    os.umask(0o077)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would swallow exit statuses
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    libc.prctl(PR_SET_NAME, b"gpusched-tree", 0, 0, 0)
    if os.geteuid() == 0:
        write_file("/proc/self/oom_score_adj", "-900")


# -- the start ------------------------------------------------------------------------------------


def start(task: Task) -> tuple[int, tuple[int, int]]:
    """Runs the command. Returns its pid and (pid, start ticks). On StartFailed nothing of it is left."""
    new_log = f"{task.log_path}.{os.path.basename(os.getcwd())}"
    log_fd = create_log(task, new_log) if task.log_path != os.devnull else os.dup(1)
    go_read, go_write = os.pipe()
    status_read, status_write = os.pipe()
    pid = 0
    try:
        pid = os.fork()
        if pid == 0:
            become_command(task, log_fd, go_read, status_write)
        for fd in (log_fd, go_read, status_write):
            os.close(fd)
        ticks = read_stat(pid)[2]
        write_record("started.json", identity_record(pid, task.boot_id))
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
    return pid, (pid, ticks)


def create_log(task: Task, path: str) -> int:
    """A fresh file of the user's, for their eyes only, under a name that it keeps only if the start succeeds."""
    try:
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


# -- the end --------------------------------------------------------------------------------------


def await_exit(main_pid: int) -> int:
    """Reaps orphans until the main process ends; returns its wait status."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == main_pid:
            return status


def record_exit(fd: int, status: int) -> None:
    """Writes exit.json: visible at once, durable a moment later (an fsync beside a big dump takes seconds)."""
    code = os.waitstatus_to_exitcode(status)
    how = f'"code": {code}' if code >= 0 else f'"signal": {-code}'
    text = f'{{{how}, "ended_unix_s": {time.clock_gettime(time.CLOCK_REALTIME):.3f}}}'
    try:
        os.pwrite(fd, text.ljust(EXIT_RECORD_BYTES).encode(), 0)
        os.rename("exit.json.part", "exit.json")
        os.fsync(fd)
        sync_directory()
    except OSError as error:  # the directory was removed: nobody wants to know any more
        complain(f"exit not recorded: {text}: {error}")


def end_rest(task: Task) -> None:
    """SIGTERM to every process that is left, SIGKILL after the grace period; returns when none is left.

    Stopped ones get SIGKILL at once: they could not act on anything else. What is another user's is waited for.
    """
    deadline = time.monotonic() + GRACE_S
    told: set[tuple[int, int]] = set()
    pause_s = 0.01
    while reap():
        late = time.monotonic() >= deadline
        rest = descendants(os.getpid())
        if late and task.cgroup and all(task.uid in (0, owner) for _, _, _, owner in rest):
            write_file(f"{task.cgroup}/cgroup.kill", "1")
        due: list[tuple[int, int, int]] = []
        for pid, ticks, stopped, _ in rest:
            if late or stopped:
                due.append((pid, ticks, signal.SIGKILL))
            elif (pid, ticks) not in told:
                told.add((pid, ticks))
                due.append((pid, ticks, signal.SIGTERM))
        send_as_user(task, due)
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 5.0 if time.monotonic() > deadline + GRACE_S else 0.5)


def send_as_user(task: Task, signals: list[tuple[int, int, int]]) -> None:
    """From a child that has become the user, so that the kernel decides whom the user may signal.

    The child is not waited for, since the user may stop it: then it is one more of the rest.
    """
    with contextlib.suppress(OSError):  # no process left: the next round tries again
        if signals and os.fork() == 0:
            try:
                drop_privileges(task)
                for pid, ticks, number in signals:
                    send_signal(pid, ticks, number)
            finally:
                os._exit(0)


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


def descendants(root: int) -> list[tuple[int, int, bool, int]]:
    """(pid, start ticks, stopped, owner) of all below ``root``, from one look at /proc; see also ``proc.py``."""
    children: dict[int, list[tuple[int, int, bool, int]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, parent, ticks, owner = read_stat(int(entry))
                found = (int(entry), ticks, state == b"T", owner)
                children.setdefault(parent, []).append(found)
    below = list(children.get(root, ()))
    for process in below:  # grows while it is read
        below.extend(children.get(process[0], ()))
    return below


def read_stat(pid: int) -> tuple[bytes, int, int, int]:
    """(state, parent, start ticks, owner). The name before them may hold anything, also ``)``."""
    fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try:
        fields = os.read(fd, 1024).rpartition(b")")[2].split()
        return fields[0], int(fields[1]), int(fields[19]), os.fstat(fd).st_uid
    finally:
        os.close(fd)


def identity_record(pid: int, boot_id: str) -> bytes:
    ticks = read_stat(pid)[2]
    return f'{{"pid": {pid}, "start_ticks": {ticks}, "boot_id": "{boot_id}"}}'.encode()


def write_record(name: str, text: bytes) -> None:
    """Whole or not at all. Not synced: a record of a running process means nothing after a power failure."""
    fd = os.open(f"{name}.part", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    os.write(fd, text)
    os.close(fd)
    os.rename(f"{name}.part", name)


def sync_directory() -> None:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def write_file(path: str, text: str) -> None:
    """One write to a file of the kernel's; where it is refused, things go on without."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - into supervisor.log


def send_report(fd: int, report: tuple[int | str, ...]) -> None:
    with contextlib.suppress(OSError):  # the daemon died: its successor finds our files
        os.write(fd, marshal.dumps(report))
    os.close(fd)


if __name__ == "__main__":
    main()
