"""One process as the simulated driver sees it during one call: its files, and what must hold before bytes are moved."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from gpusched import errors
from gpusched.mechanisms.sim.control import (
    Control,
    Record,
    Work,
    flocked,
    is_alive,
    open_plain,
    read_stat,
)
from gpusched.mechanisms.sim.layout import SimDirectory

#: Calls of a locked process are over already, unless the driver that locked it was killed before it knew.
_DRAIN_WAIT_S: Final = 5.0


class Target:
    """One process during one driver call, its files open."""

    def __init__(self, sim: SimDirectory, call: str, pid: int, stack: ExitStack) -> None:
        self._call = call
        self.pid = pid
        found = read_stat(pid)
        self._start_ticks = found.start_ticks if found else 0
        path = sim.find(pid)
        if path is None:
            raise self.error("NOT_INITIALIZED", "it uses no simulated GPU, or is gone")
        try:
            self.dir_fd = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise self.error("NOT_INITIALIZED", "it uses no simulated GPU, or is gone") from error
        stack.callback(os.close, self.dir_fd)
        if os.fstat(self.dir_fd).st_uid not in _uids(pid):
            raise self.error("NOT_PERMITTED", f"{path} belongs to another user")
        self.control = Control.open("control", len(sim.gpus), dir_fd=self.dir_fd, writable=True)
        stack.callback(self.control.close)
        self.gate_fd = open_plain("gate", os.O_RDWR, self.dir_fd)
        stack.callback(os.close, self.gate_fd)
        saved = sim.saved_of(path)
        saved.parent.mkdir(mode=0o700, exist_ok=True)
        saved.mkdir(mode=0o700, exist_ok=True)
        self.saved_fd = os.open(saved, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, self.saved_fd)

    def record(self) -> Record:
        try:
            return self.control.read(self.pid, self._start_ticks)
        except ValueError as error:
            raise self.error("INVALID_VALUE", f"its control file is damaged: {error}") from error

    def error(self, result: str, why: str, **details: object) -> errors.DriverError:
        return errors.DriverError(
            f"{self._call} of pid {self.pid} failed: {why} (simulated)",
            {"call": self._call, "result": result, "pid": self.pid, **details},
        )

    def require_alive(self) -> None:
        if not is_alive(self.pid, self._start_ticks):
            raise self.error("NOT_INITIALIZED", "the process ended")

    def require_scheduled(self) -> None:
        """CUDA's own threads in the target do the work there; a stopped process cannot be worked on."""
        found = read_stat(self.pid)
        if found is not None and found.state in "Tt":
            raise self.error("NOT_READY", "the process is stopped; continue it first")

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        try:
            with flocked(self.gate_fd, _DRAIN_WAIT_S):
                yield
        except TimeoutError as error:
            raise self.error("NOT_READY", "a call of the process goes on") from error

    @contextmanager
    def working(self, work: Work, worker: tuple[int, int]) -> Iterator[None]:
        """Until the block ends, or this driver dies, the state is CHANGING."""
        self.control.begin_work(work, worker)
        try:
            yield
        finally:
            self.control.end_work()


def _uids(pid: int) -> set[int]:
    """Real, effective, saved and file system uid of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return {int(each) for each in line.split()[1:]}
    return set()


@contextmanager
def os_errors(call: str, pid: int | None) -> Iterator[None]:
    """The one place where the system's errors become ours."""
    try:
        yield
    except TimeoutError as error:
        result, why = "NOT_READY", str(error)
        cause: OSError = error
    except OSError as error:
        # No room in the file system that stands for memory is what CUDA calls the same.
        result = (
            "OUT_OF_MEMORY" if error.errno in (errno.ENOSPC, errno.ENOMEM) else "OPERATING_SYSTEM"
        )
        why, cause = str(error), error
    else:
        return
    raise errors.DriverError(
        f"{call} of pid {pid} failed: {why} (simulated)",
        {"call": call, "result": result, "pid": pid},
    ) from cause
