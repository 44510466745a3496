"""Memory that large payloads are received into: mapped, touched once, and used again.

Most of what receiving into fresh memory costs is the kernel's zeroing of its pages, so buffers are kept. A buffer is
in use for as long as anything, an array for instance, refers to its memory: the interpreter counts that, so contents
that somebody kept are never overwritten, however long they are kept.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import Final

from gpusched.units import MIB

#: Idle buffers beyond this are given back to the system.
POOL_BYTES: Final = 512 * MIB
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python has no name for it


class BufferPool:
    """Buffers of sizes that are powers of two. Threads may share one."""

    def __init__(self, limit_bytes: int = POOL_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._buffers: list[mmap.mmap] = []

    def __repr__(self) -> str:
        sizes = [len(buffer) for buffer in self._buffers]
        return f"<BufferPool {len(sizes)} buffers, {sum(sizes)} bytes>"

    def take(self, size: int) -> memoryview:
        """Writable memory of ``size`` bytes, contents arbitrary. It goes back by itself, with its last reference."""
        wanted = max(mmap.PAGESIZE, 1 << (size - 1).bit_length())
        with self._lock:
            for buffer in self._buffers:
                if len(buffer) == wanted and _is_idle(buffer):
                    return memoryview(buffer)[:size]
            buffer = _touched(wanted)
            self._make_room(wanted)
            self._buffers.append(buffer)
            return memoryview(buffer)[:size]

    def trim(self) -> None:
        """Gives all idle buffers back, so that an image of this process does not hold them."""
        with self._lock:
            self._buffers = [buffer for buffer in self._buffers if not _is_idle(buffer)]

    def _make_room(self, size: int) -> None:
        """Forgets the oldest idle buffers until ``size`` more fit below the limit; those in use live on elsewhere."""
        excess = sum(map(len, self._buffers)) + size - self._limit_bytes
        for buffer in list(self._buffers):
            if excess <= 0:
                break
            if _is_idle(buffer):
                self._buffers.remove(buffer)
                excess -= len(buffer)
        if (
            excess > 0
        ):  # all in use, perhaps for ever: they go with their users, and the pool need not know
            self._buffers.clear()


def _is_idle(buffer: mmap.mmap) -> bool:
    """Whether nothing refers to the memory: only then may a mapping be resized, here to what it is."""
    try:
        buffer.resize(len(buffer))
    except BufferError:
        return False
    return True


def _touched(size: int) -> mmap.mmap:
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    try:
        buffer.madvise(_MADV_POPULATE_WRITE)
    except OSError:  # an older kernel
        for page in range(0, size, mmap.PAGESIZE):
            buffer[page] = 0
    return buffer
