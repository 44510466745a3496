"""Checksums of large files: while they are written, afterwards, and when they are read again.

A file is summed in pieces of 8 MiB, each with a CRC-32, so that many threads can work on it and an error says where
the damage is. CRC-32 because it is what every Python has at 4 GB/s for each thread, which no disk here outruns
(measured: BLAKE2b 0.9, SHA-256 1.8; benchmarks/criu_images.py), and because it guards against accidents alone: who can
write to the directory of images is root.

The Python here holds no lock while it reads or sums. Blocking, as long as the reading takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import msgspec

from gpusched.units import KIB, MIB

PIECE_BYTES: Final = 8 * MIB
#: Small enough to be summed while it is in the processor's cache.
_CHUNK_BYTES: Final = 512 * KIB
#: Reads in flight; disks want several, more than processors are there.
_THREADS: Final = 4
_POLL_S: Final = 0.01
_PACE_S: Final = 0.002
#: What a file that is followed keeps of the page cache. More would slow the host down when RAM is short, which is when
#: things are saved to disk; and in a virtual machine fresh memory comes more slowly than the disk takes it.
_CACHED_BYTES: Final = 128 * MIB
_SYNC_WRITE, _SYNC_WAIT = 2, 1 | 2 | 4
_libc = ctypes.CDLL(None, use_errno=True)


class FileSum(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``pieces``: the CRC-32 of each 8 MiB, the last one shorter."""

    size_bytes: int
    pieces: tuple[int, ...]


class Damaged(Exception):
    """A file is not what was summed; the text says where."""


@dataclass(slots=True)
class _Running:
    """The sum of a file as far as it was read."""

    fd: int
    size: int = 0
    pieces: list[int] = field(default_factory=list)
    synced: int = 0
    dropped: int = 0

    def read_on(self, buffer: memoryview) -> bool:
        """Reads one chunk more. False at the end of the file, as it is now."""
        room = PIECE_BYTES - self.size % PIECE_BYTES
        count = os.preadv(self.fd, [buffer[: min(room, len(buffer))]], self.size)
        if count == 0:
            return False
        if self.size % PIECE_BYTES == 0:
            self.pieces.append(0)
        self.pieces[-1] = zlib.crc32(buffer[:count], self.pieces[-1])
        self.size += count
        return True

    def start_writing(self) -> None:
        """Has the kernel begin to write what is new, so that the fsync at the end finds little to do."""
        if self.size - self.synced >= PIECE_BYTES:
            _sync_range(self.fd, self.synced, self.size - self.synced, _SYNC_WRITE)
            self.synced = self.size

    def drop_behind(self) -> None:
        """Waits for what was written long ago, and frees the memory that it takes."""
        while self.synced - self.dropped > _CACHED_BYTES:
            _sync_range(self.fd, self.dropped, PIECE_BYTES, _SYNC_WAIT)
            os.posix_fadvise(self.fd, self.dropped, PIECE_BYTES, os.POSIX_FADV_DONTNEED)
            self.dropped += PIECE_BYTES

    def result(self) -> FileSum:
        return FileSum(size_bytes=self.size, pieces=tuple(self.pieces))


class Follower:
    """Sums the files of a directory whose names begin so while somebody appends to them, in a thread of its own.

    For files that only grow at their end. Errors of reading (the file vanished) leave the file out.
    ``keep_cached``: whether they stay in the page cache, for who reads them at once.
    """

    def __init__(self, directory: int, prefix: str, *, keep_cached: bool = False) -> None:
        self._directory, self._prefix, self._keep_cached = directory, prefix, keep_cached
        self._files: dict[str, _Running] = {}
        self._finish = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, FileSum]:
        """Nobody writes any more: sums the rest and returns name -> sum. Blocks until that is done."""
        self._finish.set()
        self._thread.join()
        return {name: running.result() for name, running in self._files.items()}

    def _run(self) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            while not self._finish.wait(_POLL_S):
                self._look(buffer)
            self._look(buffer)
        finally:
            for running in self._files.values():
                os.close(running.fd)

    def _look(self, buffer: memoryview) -> None:
        for name in os.listdir(self._directory):  # noqa: PTH208
            if name.startswith(self._prefix):
                try:
                    if name not in self._files:
                        self._files[name] = _Running(_open(self._directory, name))
                    running = self._files[name]
                    while running.read_on(buffer):
                        running.start_writing()
                        if not self._keep_cached:
                            running.drop_behind()
                except OSError:  # the commit reads it once more, and fails where that fails
                    if (lost := self._files.pop(name, None)) is not None:
                        os.close(lost.fd)


def _sync_range(fd: int, offset: int, count: int, flags: int) -> None:
    """Errors are left to the fsync at the end."""
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(count), flags)


def sum_files(directory: int, names: Sequence[str]) -> dict[str, FileSum]:
    """Sums files below ``directory`` side by side. Raises OSError."""

    def one(name: str) -> FileSum:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        fd = _open(directory, name)
        try:
            running = _Running(fd)
            while running.read_on(buffer):
                pass
            return running.result()
        finally:
            os.close(fd)

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


class Pace:
    """Keeps the reading of a large file a little ahead of who reads it next, and frees what both have read.

    ``progress`` says how many bytes of it that other one has read. A wrong answer costs time, nothing else.
    """

    def __init__(self, name: str, progress: Callable[[], int]) -> None:
        self.name, self._progress = name, progress
        self._lock = threading.Lock()
        self._dropped = 0
        self._is_over = threading.Event()

    def wait(self, fd: int, offset: int) -> None:
        """Returns when it is time to read at ``offset``."""
        while not self._is_over.is_set():
            done = self._progress()
            with self._lock:
                while self._dropped + PIECE_BYTES + _CACHED_BYTES < done:
                    os.posix_fadvise(fd, self._dropped, PIECE_BYTES, os.POSIX_FADV_DONTNEED)
                    self._dropped += PIECE_BYTES
            if offset < done + 2 * _CACHED_BYTES:
                return
            self._is_over.wait(_PACE_S)

    def end(self) -> None:
        """The other one reads no more: no waiting from here on."""
        self._is_over.set()


def verify_files(
    directory: int,
    sums: Mapping[str, FileSum],
    *,
    direct: bool,
    stop: threading.Event | None = None,
    pace: Pace | None = None,
) -> None:
    """Reads everything again and compares. Raises Damaged; OSError when something cannot be read.

    ``direct``: past the page cache, so that the disk is asked; otherwise through it, so that who reads next finds it
    there. ``stop``: gives up early, without a word, when it is set.
    """
    with contextlib.ExitStack() as stack:
        files = {}
        for name in sums:
            files[name] = _checked_open(directory, name, sums[name], direct)
            stack.callback(os.close, files[name])
        local = threading.local()

        def check(job: tuple[str, int]) -> None:
            name, index = job
            if pace is not None and pace.name == name:
                pace.wait(files[name], index * PIECE_BYTES)
            if stop is not None and stop.is_set():
                return
            if not hasattr(local, "buffer"):
                local.buffer = memoryview(
                    mmap.mmap(-1, PIECE_BYTES)
                )  # aligned, as direct I/O wants
            crc = _piece(files[name], index, local.buffer, direct)
            if crc != sums[name].pieces[index]:
                where = f"the 8 MiB at offset {index * PIECE_BYTES}"
                raise Damaged(f"{name}: {where} are not what was written")

        jobs = [(name, index) for name, one in sums.items() for index in range(len(one.pieces))]
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for _ in pool.map(check, jobs):
                    pass
            except BaseException:
                if pace is not None:
                    pace.end()
                pool.shutdown(cancel_futures=True)
                raise


def _piece(fd: int, index: int, buffer: memoryview, direct: bool) -> int:
    step = PIECE_BYTES if direct else _CHUNK_BYTES
    begin, crc = index * PIECE_BYTES, 0
    for offset in range(begin, begin + PIECE_BYTES, step):
        count = os.preadv(fd, [buffer[:step]], offset)
        crc = zlib.crc32(buffer[:count], crc)
        if count < step:
            break
    return crc


def _checked_open(directory: int, name: str, expected: FileSum, direct: bool) -> int:
    try:
        fd = _open(directory, name, os.O_DIRECT if direct else 0)
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    size = os.fstat(fd).st_size
    if size != expected.size_bytes:
        os.close(fd)
        raise Damaged(f"{name} has {size} bytes and should have {expected.size_bytes}")
    return fd


def _open(directory: int, name: str, flags: int = 0) -> int:
    wanted = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, wanted | flags, dir_fd=directory)
    except OSError:
        if not flags or not _is_there(directory, name):
            raise
        return os.open(name, wanted, dir_fd=directory)  # a file system without direct I/O


def _is_there(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def walk(directory: int, below: str = "") -> Iterator[str]:
    """The names of all plain files below a directory, as paths relative to it. Symbolic links are not followed."""
    for path, _, names, fd in os.fwalk(below or ".", dir_fd=directory):
        for name in names:
            if os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode & 0o170000 == 0o100000:
                yield os.path.normpath(os.path.join(path, name))  # noqa: PTH118
