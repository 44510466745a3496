"""What a program uses instead of CUDA to have memory on a simulated GPU.

    session = device.init()
    buffer = session.allocate(64 * MIB, device=0)
    buffer.write(0, b"...")
    with buffer.access() as view:      # a memoryview; keep no copy of it past the block
        checksum = zlib.crc32(view)

Addresses stay valid across freeze, thaw and migration. Every call here passes a gate that the driver may close: it
then waits, as a CUDA call in a locked process does. The environment names the GPUs: GPUSCHED_SIM_DIR (set by the
daemon) and CUDA_VISIBLE_DEVICES (UUIDs or indices). Standard library only; no socket, no thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gpusched.mechanisms.sim.control import MAX_ALLOCATIONS, Allocation, Control, Word, read_stat
from gpusched.mechanisms.sim.layout import ENV_DIR, FRESH, SimDirectory
from gpusched.ports import Gpu
from gpusched.units import format_size

_MAX_PAUSE_S: Final = 0.02


class SimError(RuntimeError):
    """A simulated GPU cannot do what was asked."""


class NotForkSafe(SimError):
    """A forked child used its parent's simulated GPU: CUDA cannot do that either."""


class OutOfMemory(SimError):
    """An allocation did not fit. All figures in bytes."""

    def __init__(self, gpu: Gpu, needed_bytes: int, free_bytes: int, why: str = "") -> None:
        super().__init__(
            f"out of memory on simulated GPU {gpu.index}: {format_size(needed_bytes)} wanted, "
            f"{format_size(free_bytes)} of {format_size(gpu.total_bytes)} free{why}"
        )
        self.gpu = gpu
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class Session:
    """This process's use of the simulated GPUs; there is one for each process: see ``init``."""

    def __init__(self, sim: SimDirectory, visible: tuple[int, ...]) -> None:
        own = read_stat(os.getpid())
        if own is None:
            raise SimError("/proc does not show this process")
        self._pid = os.getpid()
        self._identity = (self._pid, own.start_ticks)
        self._sim = sim
        self._visible = visible
        self._table_lock = threading.Lock()
        self._table: list[Allocation] = []
        self._next_number = 1
        self._directory = sim.procs / f"{self._pid}-{own.start_ticks}"
        self._control = self._create_files()
        sim.is_self(self._directory, self._control, self._identity)

    @property
    def devices(self) -> tuple[Gpu, ...]:
        """The visible GPUs, as they were when the session began; an allocation may have moved since."""
        return tuple(self._sim.gpus[index] for index in self._visible)

    def allocate(self, size_bytes: int, device: int = 0) -> Buffer:
        """Allocates zeroed memory on the visible device number ``device``. Raises OutOfMemory with the numbers."""
        if size_bytes <= 0:
            raise ValueError(f"cannot allocate {size_bytes} bytes")
        gpu = self._visible_gpu(device)
        with self.gate():
            entry = self._reserve(gpu, size_bytes)
            try:
                memory = self._map(entry)
            except OSError as error:
                self._release(entry)
                raise OutOfMemory(
                    self._sim.gpus[gpu], size_bytes, 0, f", and host memory: {error}"
                ) from error
        return Buffer(self, entry, memory)

    def mem_get_info(self, device: int = 0) -> tuple[int, int]:
        """Free and total bytes of the GPU that ``device`` stands for now."""
        gpu = self._visible_gpu(device)
        with self.gate(), self._sim.capacity():
            here = self._gpu_map()[gpu]
            free = self._sim.free_bytes(self._sim.shares())[here]
        return free, self._sim.gpus[here].total_bytes

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Runs the block as one call of the library: waits while this process is locked, and delays a lock meanwhile.

        Do not nest it. Raises NotForkSafe in a forked child.
        """
        if os.getpid() != self._pid:
            raise NotForkSafe(
                f"the simulated GPU was set up by process {self._pid}, before the fork: "
                "like CUDA, it works only in a process that was started anew (spawn, exec)"
            )
        fd = self._pass_gate()
        try:
            yield
        finally:
            fcntl.flock(
                fd, fcntl.LOCK_UN
            )  # by name: a child forked meanwhile shares the descriptor
            os.close(fd)

    def _pass_gate(self) -> int:
        """The lock first, then the word: the driver sets the word first, then waits for the lock."""
        pause = 0.001
        while True:
            fd = os.open(self._directory / "gate", os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)
            word = self._control.word()
            if word is Word.RUNNING:
                return fd
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
            if word is Word.FAILED:
                raise SimError("the simulated driver lost this process's memory")
            time.sleep(pause)
            pause = min(pause * 2, _MAX_PAUSE_S)

    def _visible_gpu(self, device: int) -> int:
        if not 0 <= device < len(self._visible):
            raise SimError(f"no simulated GPU {device}: {len(self._visible)} visible")
        return self._visible[device]

    def _gpu_map(self) -> tuple[int, ...]:
        return self._control.read(*self._identity).gpu_map

    def _create_files(self) -> Control:
        # This very process may have been here before: exec keeps pid and start time, and drops the mappings.
        shutil.rmtree(self._directory, ignore_errors=True)
        # Under another name until it is whole and claimed: what nobody has claimed is cleared away.
        fresh = self._directory.with_name(f"{FRESH}{self._directory.name}")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o755)
        fresh.chmod(0o755)
        (fresh / "gate").touch(mode=0o600)
        control = Control.create(fresh / "control", len(self._sim.gpus))
        (fresh / "control").chmod(0o644)
        control.claim()
        fresh.rename(self._directory)
        return control

    def _path(self, entry: Allocation) -> Path:
        return self._directory / f"vram-{entry.number}"

    def _reserve(self, gpu: int, size_bytes: int) -> Allocation:
        with self._table_lock, self._sim.capacity():
            here = self._gpu_map()[gpu]
            free = self._sim.free_bytes(self._sim.shares())[here]
            if size_bytes > free:
                raise OutOfMemory(self._sim.gpus[here], size_bytes, free)
            if len(self._table) >= MAX_ALLOCATIONS:
                raise SimError(f"more than {MAX_ALLOCATIONS} allocations")
            entry = Allocation(self._next_number, gpu, size_bytes)
            self._next_number += 1
            self._table.append(entry)
            self._control.write_table(self._table, self._next_number)
        return entry

    def _release(self, entry: Allocation) -> None:
        self._path(entry).unlink(missing_ok=True)
        with self._table_lock, self._sim.capacity():
            self._table.remove(entry)
            self._control.write_table(self._table, self._next_number)

    def _map(self, entry: Allocation) -> mmap.mmap:
        fd = os.open(self._path(entry), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, entry.size_bytes)
            return mmap.mmap(fd, entry.size_bytes, mmap.MAP_SHARED)
        finally:
            os.close(fd)


class Buffer:
    """One allocation on a simulated GPU."""

    def __init__(self, session: Session, entry: Allocation, memory: mmap.mmap) -> None:
        self._session = session
        self._entry = entry
        self._memory = memory

    def __repr__(self) -> str:
        return f"<Buffer {self._entry.number} {format_size(self._entry.size_bytes)} simulated>"

    @property
    def size_bytes(self) -> int:
        return self._entry.size_bytes

    @contextlib.contextmanager
    def access(self, offset: int = 0, size: int | None = None) -> Iterator[memoryview]:
        """The bytes themselves, as one call: the process cannot be locked during the block, so keep it short."""
        end = self.size_bytes if size is None else offset + size
        if not 0 <= offset <= end <= self.size_bytes:
            raise ValueError(f"bytes {offset} to {end} of {self.size_bytes}")
        with self._session.gate(), memoryview(self._memory) as whole, whole[offset:end] as view:
            yield view

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self.access(offset, len(data)) as view:
            view[:] = data

    def read(self, offset: int, size: int) -> bytes:
        with self.access(offset, size) as view:
            return bytes(view)

    def free(self) -> None:
        """Gives the memory back; the buffer is of no use afterwards."""
        with self._session.gate():
            self._memory.close()
            self._session._release(self._entry)


#: The one global, because it stands for the process itself: what is mapped, and whether a fork came between.
_session: Session | None = None
_init_lock = threading.Lock()


def init() -> Session:
    """This process's session, set up at the first call. Raises SimError when there are no simulated GPUs to use.

    In a child forked after that, everything raises NotForkSafe.
    """
    global _session
    with _init_lock:
        if _session is None:
            directory = os.environ.get(ENV_DIR)
            if not directory:
                raise SimError(f"{ENV_DIR} is not set: start this program with `gpusched run`")
            try:
                sim = SimDirectory(Path(directory))
            except OSError as error:
                raise SimError(f"no simulated GPUs at {directory}: {error}") from error
            _session = Session(sim, visible_gpus(sim.gpus, os.environ.get("CUDA_VISIBLE_DEVICES")))
        elif os.getpid() != _session._pid:
            with _session.gate():  # raises
                pass
        return _session


def visible_gpus(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[int, ...]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES: indices or (starts of) UUIDs, up to the first that is not there."""
    if setting is None:
        return tuple(gpu.index for gpu in gpus)
    found: list[int] = []
    for item in (part.strip() for part in setting.split(",")):
        if item.isdecimal():
            matching = [gpu.index for gpu in gpus if gpu.index == int(item)]
        else:
            matching = [gpu.index for gpu in gpus if item and gpu.uuid.startswith(item)]
        if len(matching) != 1:
            break
        if matching[0] in found:
            return ()
        found += matching
    return tuple(found)
