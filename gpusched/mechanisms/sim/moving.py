"""Moving the bytes of simulated VRAM between the target's files and the saved copies.

The driver may be root and the target's directory anybody's, so every name is opened relative to a directory that is
open already, and nothing is followed. Blocking; every function may raise OSError, and says what holds then.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from gpusched.mechanisms.sim.control import Allocation, open_plain


def save(dir_fd: int, saved_fd: int, allocations: Sequence[Allocation]) -> None:
    """Copies every allocation into ``saved_fd``; each gets its name when it is whole. The originals stay."""
    for each in allocations:
        source = open_plain(f"vram-{each.number}", os.O_RDONLY, dir_fd)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            copy = os.open(f"{each.number}.part", flags, 0o600, dir_fd=saved_fd)
            try:
                _copy(source, copy, each.size_bytes)
            finally:
                os.close(copy)
        finally:
            os.close(source)
        os.rename(f"{each.number}.part", f"{each.number}", src_dir_fd=saved_fd, dst_dir_fd=saved_fd)


def bring_back(dir_fd: int, saved_fd: int, allocations: Sequence[Allocation]) -> None:
    """Copies every allocation from ``saved_fd`` to where the target has it mapped. The saved copies stay."""
    for each in allocations:
        copy = open_plain(f"{each.number}", os.O_RDONLY, saved_fd)
        try:
            target = open_plain(f"vram-{each.number}", os.O_RDWR, dir_fd)
            try:
                os.posix_fallocate(target, 0, each.size_bytes)
                _copy(copy, target, each.size_bytes)
            finally:
                os.close(target)
        finally:
            os.close(copy)


def empty(dir_fd: int, allocations: Sequence[Allocation]) -> None:
    """Gives the memory behind the target's files back; their size and the target's mappings stay."""
    for each in allocations:
        fd = open_plain(f"vram-{each.number}", os.O_RDWR, dir_fd)
        try:
            with mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED) as memory:
                # Makes a hole. The bytes are never touched through this map: the target may have cut the file short.
                memory.madvise(mmap.MADV_REMOVE)
        finally:
            os.close(fd)


def drop_saved(saved_fd: int) -> None:
    """Removes all saved copies, whole or not."""
    for name in os.listdir(saved_fd):
        os.unlink(name, dir_fd=saved_fd)


def truncate_all(directory: Path) -> None:
    """Empties a dead process's allocations, also for those who still have them mapped. Never raises."""
    try:
        dir_fd = os.open(directory, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for name in os.listdir(dir_fd):  # noqa: PTH208
            if name.startswith("vram-"):
                _truncate(name, dir_fd)
    finally:
        os.close(dir_fd)


def _truncate(name: str, dir_fd: int) -> None:
    try:
        fd = open_plain(name, os.O_WRONLY, dir_fd)
    except OSError:
        return
    try:
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _copy(source: int, destination: int, size: int) -> None:
    """Raises OSError when ``source`` is shorter than ``size``."""
    done = 0
    while done < size:
        step = os.sendfile(destination, source, done, min(size - done, 1 << 30))
        if step == 0:
            raise OSError(f"{size - done} bytes are missing")
        done += step
