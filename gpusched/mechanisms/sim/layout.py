"""How simulated GPUs lie on disk, and who may take how much of them. Shared by targets and the driver.

Covers: the files, the control record of a process, liveness, and the accounting of simulated VRAM. Does not cover:
what a target does with them (``device.py``), freezing (``driver.py``), scripted failures (``script.py``).

    DIR/gpus.json                    the simulated GPUs; written by the driver, read by all
    DIR/capacity.lock                flock: held while VRAM is promised to anybody
    DIR/procs/PID-START/             owned by the target's user
        control                      state word, GPU maps and table of allocations (see ``control.py``). Locked (fcntl)
                                     by the target while it lives: so everybody sees that, and the driver its pid
        gate                         flock: shared during a call of the target, exclusive while the driver locks
        vram-N                       the bytes of allocation N, mapped shared by the target
    DIR/saved/PID-START/N            owned by the driver: the bytes of allocation N while checkpointed.
                                     A flock on this directory: one driver call at a time for each process
    DIR/trees/TREE/procs, saved      the same for a tree in namespaces of its own, with pids as it counts them. It
                                     sees its procs as DIR/procs, and all of DIR as DIR/host. A flock on TREE: it is
                                     being brought back from disk, and its processes are not there yet

Imported by every target: keep it light.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gpusched.mechanisms.sim.control import (
    Control,
    Record,
    flocked,
    holder_of,
    inner_pid,
    open_plain,
    parse_key,
    read_stat,
)
from gpusched.ports import Gpu

ENV_DIR: Final = "GPUSCHED_SIM_DIR"
#: The name of a process's directory begins so while it is being made.
FRESH: Final = "new-"


class SimDirectory:
    """One directory of simulated GPUs, for reading and accounting. Holds nothing open."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when there are no simulated GPUs at ``path``."""
        self.path = path
        self.procs = path / "procs"
        self.saved = path / "saved"
        raw = json.loads((path / "gpus.json").read_text())
        self.gpus: tuple[Gpu, ...] = tuple(Gpu(**each) for each in raw["gpus"])
        whole = path / "host"  # a tree in namespaces of its own has its own procs in our place
        self._whole = whole if (whole / "gpus.json").exists() else path
        #: The caller's own process, whose file nobody here may open and close: that would end its lock.
        self._own: tuple[os.stat_result, Control, tuple[int, int]] | None = None
        self._found: dict[tuple[int, int], Path] = {}

    def is_self(self, directory: Path, control: Control, identity: tuple[int, int]) -> None:
        """The caller's own files."""
        self._own = directory.stat(), control, identity

    @contextmanager
    def capacity(self, timeout_s: float = 30.0) -> Iterator[None]:
        """Nobody's share of the VRAM changes meanwhile. Held for instants only; TimeoutError after ``timeout_s``."""
        fd = os.open(self.path / "capacity.lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with flocked(fd, timeout_s):
                yield
        finally:
            os.close(fd)

    def trees(self) -> list[Path]:
        """The directories of trees in namespaces of their own."""
        try:
            return [self._whole / "trees" / name for name in os.listdir(self._whole / "trees")]  # noqa: PTH208
        except FileNotFoundError:
            return []

    def find(self, pid: int) -> Path | None:
        """The directory of a live process, by the pid that the caller has for it; None when it uses no such GPU."""
        found = read_stat(pid)
        if found is None:
            return None
        plain = self.procs / f"{pid}-{found.start_ticks}"
        if plain.exists():
            return plain
        try:
            prefix = f"{inner_pid(pid)}-"
        except (OSError, ValueError):
            return None
        if prefix == f"{pid}-":
            return None
        known = self._found.get((pid, found.start_ticks))
        if known is not None and self._holder_of(known) == pid:
            return known
        for tree in self.trees():
            for name in _names(tree / "procs"):
                if name.startswith(prefix) and self._holder_of(tree / "procs" / name) == pid:
                    self._found[pid, found.start_ticks] = tree / "procs" / name
                    return tree / "procs" / name
        return None

    def saved_of(self, directory: Path) -> Path:
        """Where the driver saves the contents of the process with this directory."""
        return directory.parent.parent / "saved" / directory.name

    def record(self, pid: int) -> Record | None:
        """None when that process never used a simulated GPU (or its control file is not one)."""
        directory = self.find(pid)
        return self._record(directory) if directory is not None else None

    def records(self) -> Iterator[Record]:
        """Every live process that uses a simulated GPU."""
        for procs in (self._whole / "procs", *(tree / "procs" for tree in self.trees())):
            for name in _names(procs):
                record = self._record(procs / name)
                if record is not None:
                    yield record

    def is_alive(self, directory: Path) -> bool:
        """Whether the process that made this directory lives, or may still come to have its files."""
        return self._is_own(directory) or self._holder_of(directory) is not None

    def _is_own(self, directory: Path) -> bool:
        if self._own is None:
            return False
        try:
            return os.path.samestat(directory.stat(), self._own[0])
        except OSError:
            return False

    def _holder_of(self, directory: Path) -> int | None:
        try:
            fd = open_plain(directory / "control", os.O_RDONLY)
        except OSError:
            return None
        try:
            return holder_of(fd)
        finally:
            os.close(fd)

    def _record(self, directory: Path) -> Record | None:
        key = parse_key(directory.name)
        if key is None:
            return None
        try:
            if self._own is not None and self._is_own(directory):
                return self._own[1].read(*self._own[2])
            path = directory / "control"
            control = Control.open(path, len(self.gpus), dir_fd=None, writable=False)
        except (OSError, ValueError):
            return None
        try:
            pid = control.holder()
            return None if pid is None else control.read(pid, key[1])
        except (OSError, ValueError):
            return None
        finally:
            control.close()

    def shares(self) -> dict[int, dict[int, int]]:
        """``shares[pid][gpu index]`` in bytes: VRAM held now, and what a restore under way was promised.

        Checkpointed processes hold none and are left out.
        """
        found: dict[int, dict[int, int]] = {}
        for number, record in enumerate(self.records(), 1):
            share = record.shares()
            if share:  # without a pid it has a negative number here
                found[record.pid or -number] = share
        return found

    def free_bytes(self, shares: Mapping[int, Mapping[int, int]]) -> list[int]:
        """Free bytes of each GPU, by index, given everybody's shares."""
        free = [gpu.total_bytes for gpu in self.gpus]
        for share in shares.values():
            for gpu, size in share.items():
                free[gpu] -= size
        return [max(0, each) for each in free]


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return []
