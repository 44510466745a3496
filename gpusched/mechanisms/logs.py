"""Reading the logs that managed processes write themselves: the last lines, and what comes after them.

The files belong to hostile users, in a directory that belongs to us: a link is never followed, anything that is
not the owner's regular file is refused, and no reading takes more memory than MAX_BYTES.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable
from typing import Final

from gpusched import errors

#: The most that one answer carries, from the end of the log.
MAX_BYTES: Final = 16 * 1024 * 1024
BLOCK_BYTES: Final = 64 * 1024
FOLLOW_INTERVAL_S: Final = 0.1


def _open(path: str, uid: int) -> int:
    """A descriptor for reading. Raises NotFound, PermissionDenied."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise errors.NotFound(f"there is no log at {path}; it was removed") from None
    except OSError as error:
        raise errors.PermissionDenied(f"cannot read {path}: {error.strerror}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != uid:
        os.close(fd)
        raise errors.PermissionDenied(f"{path} is not the process's own log any more")
    return fd


def _tail(path: str, uid: int, count: int | None) -> tuple[list[str], int]:
    """The last ``count`` lines (None: all that fit into MAX_BYTES) and the offset after them."""
    fd = _open(path, uid)
    try:
        end = os.fstat(fd).st_size
        start = end
        data = b""
        while start > 0 and end - start < MAX_BYTES:
            if count is not None and data.count(b"\n") > count:
                break
            size = min(BLOCK_BYTES, start)
            start -= size
            data = os.pread(fd, size, start) + data
        text = data.decode(errors="replace")
    finally:
        os.close(fd)
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if count is not None:
        lines = lines[-count:]
    return lines, end


async def tail(path: str, uid: int, count: int) -> tuple[list[str], int]:
    """The last ``count`` lines of a log (0: 50, negative: all) and the offset behind them. Reads on a thread."""
    wanted = None if count < 0 else (count or 50)
    return await asyncio.to_thread(_tail, path, uid, wanted)


def _read_from(path: str, uid: int, offset: int) -> bytes:
    fd = _open(path, uid)
    try:
        return os.pread(fd, BLOCK_BYTES, offset)
    finally:
        os.close(fd)


async def follow(
    path: str, uid: int, offset: int, is_over: Callable[[], bool]
) -> AsyncIterator[str]:
    """Each complete line that is written after ``offset``, until ``is_over()`` and all has been read."""
    partial = b""
    while True:
        over = is_over()  # asked before reading: what was written until then is still delivered
        data = await asyncio.to_thread(_read_from, path, uid, offset)
        offset += len(data)
        *lines, partial = (partial + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if len(partial) > MAX_BYTES:
            yield partial.decode(errors="replace")
            partial = b""
        if data:
            continue
        if over:
            if partial:
                yield partial.decode(errors="replace")
            return
        await asyncio.sleep(FOLLOW_INTERVAL_S)
