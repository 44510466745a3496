"""The stand-in CUDA driver of the tests, built and used: on machines without a GPU the line-rate path runs for real."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from daemons import ROOT, wait_until
from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.ports import Description, DriverState, Obstacle, Usage

SOURCES = ROOT / "tests" / "standin"
NATIVE = ROOT / "gpusched" / "native"
_STATES = (DriverState.RUNNING, DriverState.LOCKED, DriverState.CHECKPOINTED)


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def build(directory: Path) -> None:
    """libcuda.so.1 and libdirect.so. Raises CalledProcessError."""
    for target, sources, more in (
        ("libcuda.so.1", [SOURCES / "libcuda.c"], ["-Wl,-soname,libcuda.so.1"]),
        ("libdirect.so", sorted(NATIVE.glob("*.c")), ["-Wshadow", "-mgeneral-regs-only"]),
    ):
        command = [str(compiler()), "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
        command += ["-fPIC", "-shared", "-fvisibility=hidden", *more]
        command += ["-o", str(directory / target), *map(str, sources), "-ldl", "-lpthread"]
        subprocess.run(command, check=True, timeout=120)


class StandinDriver:
    """``ports.DriverApi`` of the stand-in: what its processes keep in files is changed there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fails: str = ""  # the call that fails
        self.held: dict[int, dict[str, int]] = {}  # what processes have, where a test says

    def describe(self) -> Description:
        raise NotImplementedError

    def usage(self) -> Usage:
        return Usage(gpus={}, processes=self.held)

    def absorb(self, pid: int) -> None:
        """Nothing of it is anywhere else."""

    def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        return []

    def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        return {pid: self._state(pid) for pid in pids}

    def lock(self, pid: int, timeout_s: float) -> None:
        self._change("lock", pid, 0, 1)
        until = time.monotonic() + timeout_s
        while self._read(pid)[1] > 0:
            if time.monotonic() > until:
                self._change("unlock", pid, 1, 0)
                raise errors.LockTimeout("not at rest")
            time.sleep(0.002)

    def checkpoint(self, pid: int, *, keep_context: bool = False) -> None:
        self._change("checkpoint", pid, 1, 2)

    def restore(self, pid: int, gpu_map: Mapping[str, str] | None) -> None:
        self._change("restore", pid, 2, 1)

    def unlock(self, pid: int) -> None:
        self._change("unlock", pid, 1, 0)

    def _state(self, pid: int) -> DriverState:
        try:
            return _STATES[self._read(pid)[0]]
        except OSError:
            return DriverState.NONE

    def _read(self, pid: int) -> tuple[int, int]:
        stat = proc.read_stat(pid)
        if stat is None or not stat.is_alive:
            raise ProcessLookupError(f"no process {pid}")
        state, inside = struct.unpack("<2i", (self.directory / str(pid)).read_bytes()[:8])
        return state, inside

    def _change(self, call: str, pid: int, old: int, new: int) -> None:
        if self.fails == call:
            raise errors.DriverError(f"{call} fails", {"call": call})
        if self._read(pid)[0] != old:
            raise errors.DriverError(f"{call} in state {self._state(pid)}", {"call": call})
        fd = os.open(self.directory / str(pid), os.O_RDWR)
        try:
            with mmap.mmap(fd, 8) as page:
                page[:4] = struct.pack("<i", new)
        finally:
            os.close(fd)


class Program:
    """``standin/program.py`` under the preloaded library. Use it as a context."""

    def __init__(
        self,
        standin: Path,
        log: Path,
        *arguments: object,
        command: Sequence[str] = (),
        **env: str,
    ) -> None:
        self.log = log
        preload = {"LD_PRELOAD": str(standin / "libdirect.so")}
        own = [sys.executable, str(SOURCES / "program.py"), *map(str, arguments)]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command or own,
                stdout=out,
                stderr=out,
                env=os.environ | preload | env,
                stdin=subprocess.DEVNULL,
            )
        self.pid = self.process.pid
        wait_until(lambda: self.steps() > 0, within_s=20, what="its first step")

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def steps(self) -> int:
        """Raises AssertionError where it found anything wrong."""
        text = self.log.read_text()
        assert "WRONG" not in text, text[-500:]
        whole = text[: text.rfind("\n") + 1].splitlines()  # the last may not be written to its end
        found = [int(line.split()[1]) for line in whole if line.startswith("step")]
        return found[-1] if found else 0

    def runs_on(self) -> None:
        before = self.steps()
        wait_until(lambda: self.steps() > before, within_s=20, what="it goes on")
        assert self.process.poll() is None

    def stands_still(self) -> None:
        time.sleep(0.05)
        before = self.steps()
        time.sleep(0.2)
        assert self.steps() == before
