"""A daemon's helper as far as it matters to the tests of the line-rate path; see also ``direct_fixtures.py``."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from gpusched.mechanisms.cuda.direct import DirectDriver
from gpusched.mechanisms.cuda.pool import Pool
from gpusched.mechanisms.cuda.target import Phase, Target
from gpusched.ports import OFF_GPU, DriverState
from standin_cuda import StandinDriver


class Bench:
    """A daemon's helper as far as it matters here."""

    def __init__(self, tmp_path: Path, home: Path) -> None:
        self._processes, self._home = tmp_path / "processes", home
        self._start()

    def begin(self) -> None:
        """As a new helper does, whatever the last one left."""
        self.direct.close()  # movers end with their helper
        self._start()

    def _start(self) -> None:
        self.driver = StandinDriver(self._processes)
        self.direct = DirectDriver(self.driver, Pool(self._home))

    def freeze(self, pid: int, *, keep_context: bool = False) -> None:
        self.direct.lock(pid, 5.0)
        self.direct.checkpoint(pid, keep_context=keep_context)

    def thaw(self, pid: int) -> None:
        self.direct.restore(pid, None)
        self.direct.unlock(pid)

    def state(self, pid: int) -> DriverState:
        return self.direct.states([pid])[pid]


def off(keep_context: bool) -> DriverState:
    return DriverState.PARKED if keep_context else DriverState.CHECKPOINTED


def memory_files(pid: int) -> int:
    """The stand-in's physical memory that a process holds or has mapped."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(fd.readlink()))
    return sum("standin-vram" in link for link in links) + mapped(pid)


def mapped(pid: int) -> int:
    """The pieces of it that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("standin-vram")


def phase(pid: int) -> Phase | None:
    target = Target.find(pid)
    assert target is not None
    with target:
        return target.phase


def kill_movers(bench: Bench) -> None:
    for mover in bench.direct.movers.all():
        if mover.pid is not None:
            os.kill(mover.pid, signal.SIGKILL)


def thaw_whatever(bench: Bench, pid: int) -> None:
    """As the engine does after an error: asks what is true and goes from there."""
    state = bench.state(pid)
    if state in OFF_GPU:
        bench.direct.restore(pid, None)
        state = DriverState.LOCKED
    if state == DriverState.LOCKED:
        bench.direct.unlock(pid)
