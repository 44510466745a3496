"""The parent of one tree: starts the command, outlives the daemon, records how the command ended.

Covers: becoming a detached subreaper, or the init of the tree's own PID namespace; reporting how the start went;
recording the exit; ending what is left of the tree. Does not cover: the start itself (``supervisor_start.py``), the
namespaces (``namespaces.py``), deciding anything. The daemon's side is ``trees.py``.

A script of its own, run as ``python -I -S -X utf8 supervisor.py NAME TREE_DIR LOCK_FD REPORT_FD`` with an empty
environment and the task (``marshal``) on standard input. Standard library only, and little of it: every import is
start-up time and memory for each managed process, so no ``json``, ``pathlib``, ``dataclasses`` or ``subprocess``.

    daemon            supervisor                           command
      |- task, lock --->|- fork (into the namespaces) ------->|
      |                 |- started.json                       |- user, cgroup, chdir
      |                 |- go ------------------------------->|
      |                 |<-------- errno, or end of file -----|- execve
      |<- report -------|                                     :
      x (may die)       |<-------- exit status ---------------|
                        |- exit.json, then SIGTERM and SIGKILL to the rest of the tree

If the supervisor dies before "go", the command reads the end of the pipe instead and ends without having run.

Processes that come back from disk are CRIU's to make. The supervisor, pid 1 of fresh namespaces, reports itself,
waits for the pid of their main process on standard input, and reports that.
"""

# ruff: noqa: PTH104, PTH106, PTH120
from __future__ import annotations

import contextlib
import ctypes
import marshal
import os
import signal
import sys
import time

# At the end of the path: nothing that is installed beside us may stand in for the standard library.
sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100

from gpusched.mechanisms import bare_proc, namespaces
from gpusched.mechanisms.supervisor_start import (
    StartFailed,
    Task,
    complain,
    drop_privileges,
    identity_record,
    open_log,
    revive,
    start,
)

PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
#: What the rest of a tree gets between SIGTERM and SIGKILL once its main process has ended.
GRACE_S = 5.0
#: How long CRIU may go on in our namespace once the tree has ended; the end of an init is the end of everything there.
GUESTS_S = 30.0
#: Room for exit.json, taken at the start: a disk that fills up later must not cost the exit status.
EXIT_RECORD_BYTES = 128


def main() -> None:
    tree, lock_fd, report_fd = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    task = Task(**marshal.load(sys.stdin.buffer))  # noqa: S302 - from the daemon, through a pipe
    try:
        if task.binds is not None:
            namespaces.unshare(network=task.own_network)
    except OSError as error:
        send_report(report_fd, StartFailed.at("isolation", error).args)
        os._exit(0)
    if os.fork() == 0:
        os.chdir(tree)
        supervise(task, lock_fd, report_fd)
    # No handler of the interpreter may run twice, and the daemon waits for the first process only.
    os._exit(0)


def supervise(task: Task, lock_fd: int, report_fd: int) -> None:
    """The whole life of the supervisor. ``lock_fd`` stays open, and so locked, until it ends."""
    for fd in (lock_fd, report_fd):
        os.set_inheritable(fd, False)
    try:
        go_fd = detach(task)
        pid = int(os.readlink("/proc/self"))  # noqa: PTH115 - this /proc is the host's still
        os.write(lock_fd, identity_record(pid, bare_proc.read_stat("self")[2], task.boot_id))
        host_proc = isolate(task)
        exit_fd = os.open("exit.json.part", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(exit_fd, b" " * EXIT_RECORD_BYTES)
        main_pid, report = begin(task, go_fd, report_fd, host_proc)
        if host_proc is not None:
            os.close(host_proc)
            forward_signals(main_pid)
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
    if task.binds is not None:
        await_guests()


def detach(task: Task) -> int:
    """Own session, deaf to every signal that can be ignored, and parent of all orphans below.

    Returns the descriptor by which the daemon will say that processes are back; -1 where none are to come.
    """
    os.setsid()
    os.umask(0o077)
    go_fd = os.dup(0) if task.revive else -1
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
        bare_proc.write_file("/proc/self/oom_score_adj", "-900")
    return go_fd


def isolate(task: Task) -> int | None:
    """Makes the namespaces that we are the first in habitable; the host's /proc, or None where there are none."""
    if task.binds is None:
        return None
    try:
        host_proc = namespaces.settle(task.binds)
        if task.own_network:
            namespaces.raise_loopback()
    except OSError as error:
        raise StartFailed.at("isolation", error) from error
    return host_proc


def begin(
    task: Task, go_fd: int, report_fd: int, host_proc: int | None
) -> tuple[int, tuple[int, int]]:
    """Starts the command, or hears of what CRIU brought back; the main process's pid here, and the report."""
    if not task.revive or host_proc is None:
        return start(task, host_proc)
    open_log(task)
    own = int(os.readlink("self", dir_fd=host_proc)), bare_proc.read_stat("self", host_proc)[2]
    os.write(report_fd, marshal.dumps(own))
    return revive(task, go_fd, host_proc)


def forward_signals(main_pid: int) -> None:
    """What ends or wakes a program, sent to its init by an administrator, is meant for the program."""
    main = os.pidfd_open(main_pid)

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(main, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)


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
    while bare_proc.reap():
        late = time.monotonic() >= deadline
        rest = bare_proc.descendants(os.getpid())
        if late and task.cgroup and all(task.uid in (0, owner) for _, _, _, owner in rest):
            bare_proc.write_file(f"{task.cgroup}/cgroup.kill", "1")
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
                    bare_proc.send_signal(pid, ticks, number)
            finally:
                os._exit(0)


def await_guests() -> None:
    """The end of an init ends all in its namespace: CRIU, if it is at work on us, finds its own end first."""
    deadline = time.monotonic() + GUESTS_S
    while bare_proc.guests() and time.monotonic() < deadline:
        time.sleep(0.02)


def sync_directory() -> None:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def send_report(fd: int, report: tuple[int | str, ...]) -> None:
    with contextlib.suppress(OSError):  # the daemon died: its successor finds our files
        os.write(fd, marshal.dumps(report))
    os.close(fd)


if __name__ == "__main__":
    main()
