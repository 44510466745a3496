"""What one process that uses simulated GPUs is and has: its control file, who holds it, and how files are opened.

Both sides read and write ``control`` with pread and pwrite and never map it, so a target that truncates its own file
cannot crash the driver. Every commit is one aligned 32-bit store: a kill at any instant leaves the old or the new.

Imported by every target: keep it light.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

MAX_GPUS: Final = 1024
#: More than any test needs, and a bound on what a hostile control file can make the driver read.
MAX_ALLOCATIONS: Final = 65_536

_MAGIC: Final = b"GPUSIM01"
_WORD_AT: Final = 8
_WORK_AT: Final = 12
_WORKER_AT: Final = 16
_COUNT_AT: Final = 32
_HEADER: Final = struct.Struct("<8sIIIIQII")
_U32: Final = struct.Struct("<I")
_FLOCK: Final = struct.Struct("hhqqi4x")
_WORKER: Final = struct.Struct("<IIQ")
_MAP_AT: Final = (4096, 4096 + 2 * MAX_GPUS)
_TABLE_AT: Final = 8192
_ENTRY: Final = struct.Struct("<IIQ")


#: What a parked process keeps on a GPU, or all that it has there: stands for a CUDA context.
CONTEXT_BYTES: Final = 4 << 20


class Word(IntEnum):
    """The state of one process, as in the driver's own numbering."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    #: Ours, not the driver's: contents saved, and CONTEXT_BYTES of each GPU still taken.
    PARKED = 4


class Work(IntEnum):
    """What a driver is doing with a process at this instant; void when that driver is dead."""

    NONE = 0
    CHECKPOINTING = 1
    RESTORING = 2


class Stat(NamedTuple):
    """Fields 3 and 22 of /proc/PID/stat."""

    state: str
    start_ticks: int


class Allocation(NamedTuple):
    """One allocation. ``gpu`` is the index at the time of allocation: see ``Record.where``."""

    number: int
    gpu: int
    size_bytes: int


class Record(NamedTuple):
    """All that a control file says, read at one instant.

    ``pid`` is the reader's for that process; 0 where the reader, in another namespace, has none for it.
    """

    pid: int
    start_ticks: int
    word: Word
    work: Work
    gpu_map: tuple[int, ...]
    pending_map: tuple[int, ...]
    allocations: tuple[Allocation, ...]

    def where(self) -> tuple[int, ...] | None:
        """Which GPU stands for which original index now; None while the process holds no VRAM."""
        if self.word not in (Word.CHECKPOINTED, Word.PARKED):
            return self.gpu_map
        return self.pending_map if self.work is Work.RESTORING else None

    def shares(self) -> dict[int, int]:
        """VRAM by GPU index, in bytes: what it holds now, or what a restore under way was promised."""
        where = self.where()
        if where is not None:
            return bytes_by_gpu(self.allocations, where)
        if self.word is not Word.PARKED:
            return {}
        held = bytes_by_gpu(self.allocations, self.gpu_map)
        return {gpu: min(size, CONTEXT_BYTES) for gpu, size in held.items()}


def bytes_by_gpu(allocations: Sequence[Allocation], gpu_map: Sequence[int]) -> dict[int, int]:
    """How many bytes lie on which GPU when ``gpu_map`` holds."""
    found: dict[int, int] = {}
    for each in allocations:
        gpu = gpu_map[each.gpu]
        found[gpu] = found.get(gpu, 0) + each.size_bytes
    return found


def read_stat(pid: int) -> Stat | None:
    """State letter and start time of a live process; None when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - called for every process, every 0.25 s
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    found = Stat(fields[0].decode(), int(fields[19]))
    return None if found.state in "ZXx" else found


def is_alive(pid: int, start_ticks: int) -> bool:
    found = read_stat(pid)
    return found is not None and found.start_ticks == start_ticks


def parse_key(name: str) -> tuple[int, int] | None:
    """``"4711-88213"`` -> (pid, start_ticks); None for anything else."""
    pid, _, start = name.partition("-")
    return (int(pid), int(start)) if pid.isdecimal() and start.isdecimal() else None


def inner_pid(pid: int) -> int:
    """What a process is called in its own PID namespace. Raises OSError, ValueError."""
    with open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123 - as above
        text = file.read()
    start = text.index(b"\nNSpid:") + 7
    return int(text[start : text.index(b"\n", start)].split()[-1])


def holder_of(fd: int) -> int | None:
    """The pid of the process that has a control file locked, 0 for one that we have no pid for; None: nobody."""
    found = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    kind, _, _, _, pid = _FLOCK.unpack(found)
    return None if kind == fcntl.F_UNLCK else pid


@contextmanager
def flocked(fd: int, timeout_s: float) -> Iterator[None]:
    """Holds an exclusive flock on ``fd``. Raises TimeoutError after ``timeout_s`` seconds.

    It is released by name, not by closing: a child forked meanwhile would keep it otherwise.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.0005
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"not free within {timeout_s:g} s") from None
        time.sleep(pause)
        pause = min(pause * 2, 0.005)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


class Control:
    """The control file of one process, open. The target writes the table, the driver all the rest.

    Two maps lie side by side; the state word says which one holds, so that a restore on other GPUs takes effect in
    one store.
    """

    def __init__(self, fd: int, gpus: int) -> None:
        self._fd = fd
        self._gpus = gpus

    @classmethod
    def create(cls, path: Path, gpus: int) -> Control:
        """Writes a fresh control file at ``path``: RUNNING, every GPU standing for itself, no allocations."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        control = cls(fd, gpus)
        control._write_map(0, range(gpus))
        os.pwrite(fd, _HEADER.pack(_MAGIC, Word.RUNNING, Work.NONE, 0, 0, 0, 0, 1), 0)
        return control

    @classmethod
    def open(cls, name: str | Path, gpus: int, *, dir_fd: int | None, writable: bool) -> Control:
        """Raises OSError when there is none, or none that may be trusted."""
        return cls(open_plain(name, os.O_RDWR if writable else os.O_RDONLY, dir_fd), gpus)

    def close(self) -> None:
        os.close(self._fd)

    def claim(self) -> None:
        """Locks the file until this process ends, or closes *any* descriptor of it. Raises OSError."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def holder(self) -> int | None:
        """See ``holder_of``. The caller's own lock does not count."""
        return holder_of(self._fd)

    def word(self) -> Word:
        return Word(self._u32(_WORD_AT) & 0xFF)

    def set_word(self, word: Word, *, switch_map: bool = False) -> None:
        """The commit of every step; ``switch_map`` also puts the pending map in force."""
        slot = self._u32(_WORD_AT) >> 8 & 1
        os.pwrite(self._fd, _U32.pack(word | (slot ^ switch_map) << 8), _WORD_AT)

    def begin_work(self, work: Work, worker: tuple[int, int]) -> None:
        self.end_work()  # what a dead driver left here must not look like ours for an instant
        os.pwrite(self._fd, _WORKER.pack(worker[0], 0, worker[1]), _WORKER_AT)
        os.pwrite(self._fd, _U32.pack(work), _WORK_AT)

    def end_work(self) -> None:
        os.pwrite(self._fd, _U32.pack(Work.NONE), _WORK_AT)

    def set_pending_map(self, gpu_map: Sequence[int]) -> None:
        self._write_map((self._u32(_WORD_AT) >> 8 & 1) ^ 1, gpu_map)

    def write_table(self, allocations: Sequence[Allocation], next_number: int) -> None:
        """Call it with the capacity lock held: readers take that lock too."""
        os.pwrite(self._fd, b"".join(_ENTRY.pack(*each) for each in allocations), _TABLE_AT)
        os.pwrite(self._fd, struct.pack("<II", len(allocations), next_number), _COUNT_AT)

    def read(self, pid: int, start_ticks: int) -> Record:
        """Raises ValueError for anything that a target of this version would not have written."""
        data = os.pread(self._fd, _TABLE_AT, 0)
        if len(data) < _HEADER.size or not data.startswith(_MAGIC):
            raise ValueError("not a control file")
        _, word, work, worker_pid, _, worker_start, count, _ = _HEADER.unpack_from(data)
        if count > MAX_ALLOCATIONS:
            raise ValueError(f"{count} allocations")
        slot = word >> 8 & 1
        table = os.pread(self._fd, count * _ENTRY.size, _TABLE_AT)
        working = Work(work)
        if working is not Work.NONE and not is_alive(worker_pid, worker_start):
            working = Work.NONE
        return Record(
            pid=pid,
            start_ticks=start_ticks,
            word=Word(word & 0xFF),
            work=working,
            gpu_map=self._read_map(data, slot),
            pending_map=self._read_map(data, slot ^ 1) if working is Work.RESTORING else (),
            allocations=tuple(
                entry
                for entry in (
                    Allocation(*fields)
                    for fields in _ENTRY.iter_unpack(table[: len(table) // 16 * 16])
                )
                if entry.gpu < self._gpus
            ),
        )

    def _u32(self, offset: int) -> int:
        value: int = _U32.unpack(os.pread(self._fd, 4, offset))[0]
        return value

    def _write_map(self, slot: int, gpu_map: Sequence[int]) -> None:
        os.pwrite(self._fd, struct.pack(f"<{self._gpus}H", *gpu_map), _MAP_AT[slot])

    def _read_map(self, data: bytes, slot: int) -> tuple[int, ...]:
        if len(data) < _MAP_AT[slot] + 2 * self._gpus:
            raise ValueError("a map is missing")
        found: tuple[int, ...] = struct.unpack_from(f"<{self._gpus}H", data, _MAP_AT[slot])
        if any(gpu >= self._gpus for gpu in found):
            raise ValueError("a map names a GPU that is not there")
        return found


def open_plain(name: str | Path, flags: int, dir_fd: int | None = None) -> int:
    """Opens a regular file that has one name and is no link; raises OSError for anything else.

    The driver may be root and the directory another user's: nothing in it is followed.
    """
    # O_NONBLOCK: a pipe of that name must not make anybody wait.
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return fd
    os.close(fd)
    raise PermissionError(f"{name} is not a plain file")
