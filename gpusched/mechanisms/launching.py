"""The daemon's side of a start: hands a task to a new supervisor and hears how it went. Blocking.

Covers: the files, the control group and the supervisor process of a new tree; mapping failures to our errors; taking
back a start that failed or hangs. Does not cover: what happens in the supervisor (``supervisor.py``).
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpusched import errors
from gpusched.mechanisms import cgroups, proc
from gpusched.mechanisms.tree_files import TreeFiles
from gpusched.ports import Identity, Launch

#: A start takes some 30 ms; longer than this means a dead network file system or a stopped supervisor.
_START_TIMEOUT_S = 30.0
#: After SIGKILL a process may still be in the kernel: a driver call, a large address space.
_END_TIMEOUT_S = 60.0
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


def start(launch: Launch, files: TreeFiles, ground: Ground) -> Identity:
    """Starts a tree. Blocks for the start of an interpreter, 30 s at most. Errors: see ``TreeKeeper.launch``."""
    try:
        lock_fd = files.create()
    except FileExistsError:
        raise errors.AlreadyExists(f"tree {launch.tree_id} exists already") from None
    except OSError as error:
        raise _system_error(launch, error.errno, str(error)) from error
    group = ground.groups.path_for(launch.tree_id)
    try:
        files.write_launch(
            launch, group
        )  # before the group is made: nobody would find it otherwise
        joined = group if group is not None and cgroups.create(group) else None
        return _run_supervisor(launch, files, ground, joined, lock_fd)
    except BaseException as error:
        if group is not None:
            cgroups.remove(group)
        for path in (*ground.own_directories(launch.tree_id), files.path):
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise _system_error(launch, error.errno, str(error)) from error
        raise
    finally:
        os.close(lock_fd)  # from here on the supervisor alone holds the lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all trees of one keeper have in common.

    ``binds``: directories of the host and where an isolated tree sees them, ``{tree}`` standing for its id. Those
    with ``{tree}`` in them are made for each tree, writable for its users.
    """

    groups: cgroups.TreeGroups
    boot_id: str
    binds: Sequence[tuple[str, str]] = ()

    def own_directories(self, tree_id: str) -> list[Path]:
        """What was made on the host for this tree alone."""
        return [
            Path(source.partition("{tree}")[0]) / tree_id
            for source, _ in self.binds
            if "/{tree}" in source
        ]

    def task(self, launch: Launch, group: Path | None, **more: object) -> dict[str, Any]:
        """What the supervisor is told. Raises OSError when a directory cannot be made."""
        fields = asdict(launch)
        for own in ("tree_id", "name", "isolated"):
            del fields[own]
        binds = None
        if launch.isolated:
            binds = [(source.format(tree=launch.tree_id), target) for source, target in self.binds]
            for (source, _), (pattern, _) in zip(binds, self.binds, strict=True):
                if source != pattern:
                    _make_shared(Path(source))
        defaults = {"own_network": False, "revive": False, "fresh_log": False}
        group_name = str(group) if group else None
        return {
            **fields,
            "cgroup": group_name,
            "boot_id": self.boot_id,
            "binds": binds,
            **defaults,
            **more,
        }


def _make_shared(path: Path) -> None:
    """A directory like /tmp, in one that is root's."""
    path.parent.mkdir(mode=0o755, exist_ok=True)
    path.mkdir(exist_ok=True)
    path.chmod(0o1777)


def record_adopted(launch: Launch, files: TreeFiles, main: Identity) -> None:
    """Raises AlreadyExists, InsufficientDisk; then nothing was written."""
    try:
        files.write_adopted(launch, main)
    except FileExistsError:
        raise errors.AlreadyExists(f"tree {launch.tree_id} exists already") from None
    except OSError as error:
        shutil.rmtree(files.path, ignore_errors=True)
        raise _system_error(launch, error.errno, str(error)) from error


def _run_supervisor(
    launch: Launch, files: TreeFiles, ground: Ground, group: Path | None, lock_fd: int
) -> Identity:
    with _Supervisor(launch, files, lock_fd) as supervisor:
        supervisor.tell(ground.task(launch, group))
        return supervisor.main(ground.boot_id)


def revive(
    launch: Launch,
    files: TreeFiles,
    ground: Ground,
    bring_back: Callable[[Identity], int],
    **how: object,
) -> Identity:
    """Makes fresh namespaces, has ``bring_back`` fill them and takes the result for a tree. Blocks for all of it.

    ``bring_back`` gets the identity of the init and returns the pid that the main process has inside. After an error,
    its own or ours, nothing runs and no file is left. ``how``: see ``supervisor_start.Task``.
    """
    files.discard_stale()
    lock_fd = files.create()
    group = ground.groups.path_for(launch.tree_id)
    try:
        files.write_launch(launch, group)
        joined = group if group is not None and cgroups.create(group) else None
        with _Supervisor(launch, files, lock_fd) as supervisor:
            supervisor.tell(ground.task(launch, joined, revive=True, **how), and_wait=True)
            init = supervisor.init(ground.boot_id)
            supervisor.go(bring_back(init))
            return supervisor.main(ground.boot_id)
    except BaseException as error:
        end(files)
        if group is not None:
            cgroups.remove(group)
        for path in (*ground.own_directories(launch.tree_id), files.path):
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise _system_error(launch, error.errno, str(error)) from error
        raise
    finally:
        os.close(lock_fd)


def end(files: TreeFiles) -> bool:
    """SIGKILL to the init of an isolated tree, and so to all of it. Waits; whether nothing of it is left."""
    init, main = files.supervisor(), files.main()
    deadline = time.monotonic() + _END_TIMEOUT_S
    while time.monotonic() < deadline:
        left = [i for i in (init, main) if i is not None and _is_there(i)]
        if not left:
            return True
        for identity in left:
            with contextlib.suppress(OSError):
                send_signal(identity.pid, identity.start_ticks, signal.SIGKILL)
        time.sleep(0.005)
    return False


def _is_there(identity: Identity) -> bool:
    """Whether a process still has anything; its parent may not have looked at its end yet."""
    stat = proc.read_stat(identity.pid)
    return stat is not None and stat.start_ticks == identity.start_ticks and stat.is_alive


class _Supervisor:
    """A new supervisor, from its start until it has said how things went. Use it as a context."""

    def __init__(self, launch: Launch, files: TreeFiles, lock_fd: int) -> None:
        self._launch = launch
        self._files = files
        self._deadline = time.monotonic() + _START_TIMEOUT_S
        self._report, report_write = os.pipe()
        try:
            with open(files.path / "supervisor.log", "xb", opener=_private) as log:
                command = [sys.executable, "-I", "-S", "-X", "utf8", str(_SUPERVISOR)]
                self._child = subprocess.Popen(
                    [*command, launch.name, str(files.path), str(lock_fd), str(report_write)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env={},
                    cwd="/",
                    pass_fds=(lock_fd, report_write),
                )
        except BaseException:
            os.close(self._report)
            raise
        finally:
            os.close(report_write)

    def __enter__(self) -> _Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._report)
        self._hang_up()

    def tell(self, task: dict[str, Any], *, and_wait: bool = False) -> None:
        """Hands the task over; ends as soon as the supervisor has forked itself away from us."""
        assert self._child.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.write(marshal.dumps(task))
                self._child.stdin.flush()
            if not and_wait:
                self._hang_up()
            self._child.wait(_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._hangs() from None

    def init(self, boot_id: str) -> Identity:
        """The identity of the supervisor itself, which waits for ``go``."""
        return _understand(self._read(to_end=False), self._launch, self._files, boot_id)

    def go(self, main_pid: int) -> None:
        """What was to come back is there."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the report says why
            self._child.stdin.write(str(main_pid).encode())
            self._child.stdin.flush()
        self._hang_up()
        self._deadline = time.monotonic() + _START_TIMEOUT_S

    def main(self, boot_id: str) -> Identity:
        """The identity of the main process. Raises what the start failed by."""
        return _understand(self._read(to_end=True), self._launch, self._files, boot_id)

    def _hang_up(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()

    def _read(self, *, to_end: bool) -> bytes:
        try:
            return _read_report(self._report, self._deadline, to_end=to_end)
        except TimeoutError:
            raise self._hangs() from None

    def _hangs(self) -> errors.DeadlineExceeded:
        abandon(self._files)
        return errors.DeadlineExceeded(
            f"starting {self._launch.name} took more than {_START_TIMEOUT_S:.0f} s and was given up; "
            "does its directory or its program lie on a file system that hangs?"
        )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read_report(fd: int, deadline: float, *, to_end: bool) -> bytes:
    """One report, or all up to the end of the file. Raises TimeoutError."""
    poll = select.poll()  # select() cannot do descriptors above 1023
    poll.register(fd, select.POLLIN)
    parts: list[bytes] = []
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        part = os.read(fd, 65536)
        parts.append(part)
        if not part or not to_end:  # a report is one write, short enough to be whole
            return b"".join(parts)
    raise TimeoutError


def _understand(report: bytes, launch: Launch, files: TreeFiles, boot_id: str) -> Identity:
    try:
        parts = marshal.loads(report)  # noqa: S302 - from our own supervisor
    except (EOFError, ValueError):
        raise errors.InternalError(
            f"the supervisor of {launch.name} ended before the start: {files.complaint()}"
        ) from None
    if len(parts) == 2:
        pid, start_ticks = parts
        return Identity(pid=pid, start_ticks=start_ticks, boot_id=boot_id)
    stage, number, text = parts
    raise _start_error(launch, stage, number, text)


def _start_error(launch: Launch, stage: str, number: int, text: str) -> errors.GpuschedError:
    """What the supervisor reported, for the person who typed the command."""
    details = {"stage": stage, "errno": errno.errorcode.get(number, "")}
    reason = text[:1].lower() + text[1:]
    if stage == "chdir":
        return errors.InvalidRequest(f"cannot work in directory {launch.cwd!r}: {reason}", details)
    if stage == "exec":
        program = launch.argv[0]
        hint = ""
        if number == errno.ENOEXEC:
            hint = "; a script must begin with #! and its interpreter"
        elif "/" not in program:
            hint = f"; looked in PATH={launch.env.get('PATH', os.defpath)}"
        elif not program.startswith("/"):
            hint = f"; looked in {launch.cwd}"
        return errors.InvalidRequest(f"cannot execute {program!r}: {reason}{hint}", details)
    if stage == "user" and number == errno.EPERM:
        return errors.PermissionDenied(
            f"the daemon runs as uid {os.geteuid()} and cannot start processes of uid {launch.uid}",
            details,
        )
    if stage == "isolation":
        return errors.Unsupported(
            f"cannot give {launch.name} namespaces of its own: {reason}; "
            f"run it without: gpusched run --no-isolate ...",
            details,
        )
    if stage == "log":
        reason = f"log {launch.log_path}: {reason}"
    return _system_error(launch, number, reason).with_details(**details)


def _system_error(launch: Launch, number: int | None, reason: str) -> errors.GpuschedError:
    text = f"cannot take on {launch.name}: {reason}"
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return errors.InsufficientDisk(text)
    if number in {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}:
        return errors.Unavailable(f"{text}; the host has no process, memory or descriptor left")
    return errors.InternalError(text)


def abandon(files: TreeFiles) -> None:
    """Ends a start that hangs: without its supervisor a command that has not begun never begins."""
    for read in (files.supervisor, files.main):  # the second is read when the first is dying
        identity = read()
        if identity is not None:
            with contextlib.suppress(OSError):
                send_signal(identity.pid, identity.start_ticks, signal.SIGKILL)


def send_signal(pid: int, start_ticks: int, number: int) -> None:
    """By pidfd, and only to the process that was meant. One that is gone is passed over. Raises OSError."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The descriptor was opened before this look, so it cannot belong to a successor of what we see.
        stat = proc.read_stat(pid)
        if stat is not None and stat.start_ticks == start_ticks:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)
