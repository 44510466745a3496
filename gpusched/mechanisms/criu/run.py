"""Running CRIU in the namespaces of a tree: saving its processes and bringing them back. Blocking; root only.

Covers: starting CRIU, its time limit, ending it for certain, and what its failures mean. Does not cover: making the
image durable (``images.py``), what makes a tree impossible to save (``preflight.py``), fresh namespaces to restore
into, the GPU.

After a dump the processes are all stopped, and after a restore too: whoever called decides when they go on. The
first process of the namespaces must not end while CRIU works there.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import command, complaint, threads
from gpusched.mechanisms.criu.gate import Gate
from gpusched.mechanisms.criu.inside import Inside, Task, send
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.criu.threads import Captured
from gpusched.units import GIB, MIB, format_size

#: The pid of every tree's main process in its namespace.
MAIN_PID: Final = 1000
GHOST_LIMIT_BYTES: Final = GIB
#: The slowest disk that is waited for, and what is granted on top.
_SLOWEST_BYTES_PER_S: Final = 32 * MIB
_BASE_S: Final = 60.0
_END_S: Final = 10.0
_POLL_S: Final = 0.005
#: How often it is asked whether a dump is still wanted.
_LOOK_S: Final = 0.05
#: When memory is short: what is being saved may not survive the end of CRIU. What comes back has its image still, and
#: begins with CRIU's own score, since CRIU sets none that was 0.
_SCORES: Final = {"dump": -1000, "restore": 0}
#: How long a good moment to end CRIU is waited for.
_PATIENCE_S: Final = 2.0
#: Lies beside the dump, also when that is complete: until the commit nobody else knows who was stopped.
_RECORD: Final = "threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A dump that succeeded. ``captured`` is for ``undo_dump``."""

    duration_s: float
    captured: Captured


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The tree is back and stopped. ``main`` is its main process, ``tasks`` all of it."""

    main: Task
    tasks: tuple[Task, ...]
    duration_s: float


def time_limit_s(size_bytes: int) -> float:
    """What a dump or restore of so much memory may take."""
    return _BASE_S + size_bytes / _SLOWEST_BYTES_PER_S


def dump(
    program: Program,
    inside: Inside,
    images_fd: int,
    *,
    name: str,
    timeout_s: float,
    main_pid: int = MAIN_PID,
    ghost_limit_bytes: int = GHOST_LIMIT_BYTES,
    require_wanted: Callable[[], None] | None = None,
) -> Done:
    """Saves the tree below ``main_pid`` (as it is inside) into the directory ``images_fd``.

    Afterwards all its processes are stopped and the files are complete, but not durable. Blocks for ``timeout_s`` and
    20 s at most. Raises CriuError, InsufficientDisk, DeadlineExceeded, Unavailable (nsenter is missing): then every
    process is as it was before, running or stopped, and no CRIU works on it; what is in the directory is worthless.
    So too with what ``require_wanted`` raises, which is called again and again meanwhile.
    Whoever dies in the middle leaves there what ``recover_dump`` needs.
    """
    _remove_remaps(inside)
    begun = time.monotonic()
    captured = threads.note(inside)
    try:
        _write_record(images_fd, captured)
        captured = threads.stop_and_capture(inside, captured)
        _write_record(images_fd, captured)
        captured = threads.ask_traps(captured)
        _write_record(images_fd, captured)
        threads.arm(captured)
        with _empty_directory() as plugins:
            argv = command.dump(main_pid, images_fd, plugins, ghost_limit_bytes)
            fds = (images_fd, plugins)
            _run(program, inside, argv, fds, timeout_s, name, require_wanted=require_wanted)
        threads.disarm(captured)
    except BaseException as error:
        undo_dump(inside, captured)
        if isinstance(error, _Failed):
            raise _dump_error(error, images_fd, name) from None
        if isinstance(error, OSError):
            raise _disk_error(images_fd, name, []) from error
        raise
    return Done(duration_s=time.monotonic() - begun, captured=captured)


def restore(
    program: Program,
    inside: Inside,
    images_fd: int,
    *,
    name: str,
    timeout_s: float,
    inherited: Mapping[str, int] | None = None,
    main_pid: int = MAIN_PID,
    once_loaded: Callable[[], None] | None = None,
) -> Restored:
    """Brings a tree back into fresh namespaces, stopped. Descriptors in ``inherited`` (path as dumped -> descriptor
    that was opened inside, see ``inside.open_log``) take the place of files; closing ours is the caller's part.
    ``once_loaded`` is called when CRIU has its own libraries and has not touched anything; what it raises is raised.

    Blocks for ``timeout_s`` and 20 s at most. Raises CriuError, DeadlineExceeded, Unavailable: then nothing of the
    tree and no CRIU is left in the namespaces, and the image is as it was.
    """
    given = dict(inherited or {})
    begun = time.monotonic()
    try:
        with _empty_directory() as empty:
            # As its working directory too: what it would write there are its statistics.
            argv = command.restore(images_fd, empty, empty, inherited=given)
            fds = (images_fd, empty, *given.values())
            _run(program, inside, argv, fds, timeout_s, name, once_loaded)
        tasks = inside.tasks()
        main = next((task for task in tasks if task.inner_pid == main_pid), None)
        if main is None:
            raise _Failed("", f"{name} ended while it was brought back")
        threads.disarm_restored(_read_record(images_fd) or Captured(), tasks)
    except BaseException as error:
        end_everybody(inside)
        if isinstance(error, _Failed):
            raise _error(error, name, "bring back") from None
        raise
    return Restored(main=main, tasks=tuple(tasks), duration_s=time.monotonic() - begun)


# -- for recovery ---------------------------------------------------------------------------------


def find_running_criu(program: Program, inside: Inside) -> list[int]:
    """Host pids of CRIU at work in these namespaces, and of what leads it in; whoever started it."""
    return inside.guests(program.executable)


def end_running_criu(program: Program, inside: Inside, timeout_s: float = _END_S) -> None:
    """Kills CRIU in these namespaces and waits until it is gone.

    At a moment, if one comes within 2 s, at which also processes that could not be armed survive that
    (``threads.may_be_left``); then ``recover_dump`` is due. Raises DeadlineExceeded when something of it is still there
    after ``timeout_s``.
    """
    patience = time.monotonic() + _PATIENCE_S

    def is_good_moment(pids: Sequence[int]) -> bool:
        _signal(pids, signal.SIGSTOP)
        halted = time.monotonic() + _POLL_S
        while not all(_is_halted(pid) for pid in pids) and time.monotonic() < halted:
            time.sleep(_POLL_S / 20)
        return threads.may_be_left(inside.tasks()) or time.monotonic() > patience

    _end(lambda: find_running_criu(program, inside), timeout_s, is_good_moment)


def end_everybody(inside: Inside, timeout_s: float = _END_S) -> None:
    """Kills all processes in the namespaces but the first one. Raises DeadlineExceeded when one does not end."""
    _end(inside.everybody, timeout_s, lambda _: True)


def recover_dump(program: Program, inside: Inside, images_fd: int) -> None:
    """What an earlier daemon left of a dump: its CRIU is ended, and every process is as it was before.

    Where nothing of a dump is left nothing is done. Raises DeadlineExceeded like ``end_running_criu``.
    """
    end_running_criu(program, inside)
    if (captured := _read_record(images_fd)) is not None:
        undo_dump(inside, captured)


def undo_dump(inside: Inside, captured: Captured) -> None:
    """After a dump that failed, or whose image was not kept: who was stopped before is stopped, all others go on.

    Blocks for milliseconds. No CRIU may be left.
    """
    threads.put_back(captured)
    threads.go_on(inside, captured)
    _remove_remaps(inside)


def resume(tasks: Collection[Task]) -> None:
    """Lets restored (or dumped) processes go on."""
    for task in tasks:
        send(task.pid, task.start_ticks, signal.SIGCONT)


# -- one run --------------------------------------------------------------------------------------


class _Failed(Exception):
    """CRIU did not succeed: its log, and what is to be said where the log says nothing."""

    def __init__(self, log: str, reason: str = "", timed_out: bool = False) -> None:
        super().__init__(reason)
        self.log, self.reason, self.timed_out = log, reason, timed_out


def _run(
    program: Program,
    inside: Inside,
    argv: Sequence[str],
    fds: Sequence[int],
    timeout_s: float,
    name: str,
    once_loaded: Callable[[], None] | None = None,
    require_wanted: Callable[[], None] | None = None,
) -> str:
    """Returns the log. Whatever is raised, CRIU has ended."""
    # In memory: the disk may be full, and that is when the log matters.
    with open(os.memfd_create("criu-log"), "w+b") as log, Gate(once_loaded) as gate:  # noqa: PTH123
        command_line = [program.path, *argv, *gate.options]
        try:
            running = inside.start(
                command_line, output=log, pass_fds=[*fds, *gate.fds], oom_score=_SCORES[argv[0]]
            )
        except OSError as error:
            raise errors.Unavailable(f"{argv[0]} of {name} cannot be started: {error}") from error
        code: int | None = None
        try:
            gate.let_through(running, timeout_s)
            code = _await(running, timeout_s, require_wanted)
        except subprocess.TimeoutExpired:
            raise _Failed(_text(log), f"CRIU took more than {timeout_s:.0f} s", True) from None
        finally:
            if code != 0:
                end_running_criu(program, inside)
                running.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(_END_S)
        text = _text(log)
    if code != 0:
        killed = f"CRIU was ended by signal {-code}" if code < 0 else ""
        raise _Failed(text, killed)
    return text


def _await(
    running: subprocess.Popen[bytes], timeout_s: float, require_wanted: Callable[[], None] | None
) -> int:
    """The exit code. Raises TimeoutExpired, and what ``require_wanted`` raises."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        try:
            return running.wait(left if require_wanted is None else min(left, _LOOK_S))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline or require_wanted is None:
                raise
        require_wanted()


def _text(log: IO[bytes]) -> str:
    fd = log.fileno()
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


@contextlib.contextmanager
def _empty_directory() -> Iterator[int]:
    """One that nobody can put anything into, and that is gone whoever dies."""
    path = tempfile.mkdtemp(prefix="gpusched-criu-")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.rmdir(path)  # noqa: PTH106
        yield fd
    finally:
        os.close(fd)


def _end(
    find: Callable[[], list[int]], timeout_s: float, is_good_moment: Callable[[Sequence[int]], bool]
) -> None:
    deadline = time.monotonic() + timeout_s
    while pids := find():
        if time.monotonic() > deadline:
            raise errors.DeadlineExceeded(
                f"processes {', '.join(map(str, pids))} were killed and have not ended within {timeout_s:g} s",
                {"pids": pids},
            )
        _signal(pids, signal.SIGKILL if is_good_moment(pids) else signal.SIGCONT)
        time.sleep(_POLL_S / 5)


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        send(pid, None, number)


def _is_halted(pid: int) -> bool:
    found = proc.read_stat(pid)
    return found is None or found.is_stopped or not found.is_alive


def _write_record(images_fd: int, captured: Captured) -> None:
    """Whole or not at all. It need not survive more than this process."""
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
    fd = os.open(f"{_RECORD}.part", flags, 0o600, dir_fd=images_fd)
    with os.fdopen(fd, "wb") as file:
        file.write(threads.encode(captured))
    os.rename(f"{_RECORD}.part", _RECORD, src_dir_fd=images_fd, dst_dir_fd=images_fd)


def _read_record(images_fd: int) -> Captured | None:
    """None where there is none."""
    with contextlib.suppress(OSError):
        fd = os.open(_RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=images_fd)
        with os.fdopen(fd, "rb") as file:
            return threads.decode(file.read())
    return None


# -- what it means --------------------------------------------------------------------------------


def _dump_error(failed: _Failed, images_fd: int, name: str) -> errors.GpuschedError:
    if complaint.disk_is_full(failed.log) or _free_bytes(images_fd) < MIB:
        return _disk_error(images_fd, name, complaint.tail(failed.log))
    return _error(failed, name, "save")


def _disk_error(images_fd: int, name: str, log: list[str]) -> errors.InsufficientDisk:
    free = _free_bytes(images_fd)
    return errors.InsufficientDisk(
        f"the disk for snapshots became full while {name} was saved ({format_size(free)} are free); "
        "free some, or choose another with --disk-dir",
        {"free_bytes": free, "criu_log": log},
    )


def _free_bytes(fd: int) -> int:
    about = os.fstatvfs(fd)
    return about.f_bavail * about.f_frsize


def _error(failed: _Failed, name: str, action: str) -> errors.GpuschedError:
    details = {
        "criu_log": complaint.tail(failed.log),
        "errors": complaint.error_lines(failed.log)[:10],
    }
    if failed.timed_out:
        return errors.DeadlineExceeded(f"could not {action} {name}: {failed.reason}", details)
    if failed.reason:
        return errors.CriuError(f"could not {action} {name}: {failed.reason}", details)
    return errors.CriuError(complaint.explain(failed.log, name, action), details)


def _remove_remaps(inside: Inside) -> None:
    """A dump leaves names behind that it made for files without one (semaphores, in /dev/shm).

    They belong to the image, and stand in the way of the next dump.
    """
    with contextlib.suppress(OSError):
        directory = inside.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY)  # noqa: S108
        try:
            for entry in os.listdir(directory):  # noqa: PTH208
                if re.fullmatch(r"link_remap\.\d+", entry):
                    os.unlink(entry, dir_fd=directory)
        finally:
            os.close(directory)
