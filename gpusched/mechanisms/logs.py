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
MAX_BYTES: Final = 4 * 1024 * 1024
BLOCK_BYTES: Final = 64 * 1024
FOLLOW_INTERVAL_S: Final = 0.1
#: A line that does not end is followed in pieces of this size.
MAX_LINE_BYTES: Final = 1024 * 1024


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


def _tail(path: str, uid: int, count: int | None, *, only_whole: bool) -> tuple[list[str], int]:
    """The last ``count`` lines (None: all that fit into MAX_BYTES) and the offset after them."""
    fd = _open(path, uid)
    try:
        start = end = os.fstat(fd).st_size
        blocks: list[bytes] = []
        newlines = 0
        while start > 0 and end - start < MAX_BYTES:
            if count is not None and newlines > count:
                break
            size = min(BLOCK_BYTES, start)
            start -= size
            blocks.append(os.pread(fd, size, start))
            newlines += blocks[-1].count(b"\n")
    finally:
        os.close(fd)
    lines = b"".join(reversed(blocks)).split(b"\n")
    if only_whole:
        end -= len(lines[-1])
        lines[-1] = b""
    if lines[-1] == b"":
        lines.pop()
    if start > 0 and len(lines) > 1:
        del lines[0]  # its beginning was not read
    if count is not None:
        lines = lines[-count:]
    return [line.decode(errors="replace") for line in lines], end


async def tail(path: str, uid: int, count: int, *, only_whole: bool) -> tuple[list[str], int]:
    """The last ``count`` lines of a log (0: 50, negative: all) and the offset behind them. Reads on a thread.

    ``only_whole``: a line that is still being written is left to ``follow``. Raises NotFound, PermissionDenied.
    """
    wanted = None if count < 0 else (count or 50)
    return await asyncio.to_thread(_tail, path, uid, wanted, only_whole=only_whole)


async def follow(
    path: str, uid: int, offset: int, is_over: Callable[[], bool]
) -> AsyncIterator[str]:
    """Each complete line that is written after ``offset``, until ``is_over()`` and all has been read.

    The file is opened once: whatever takes its name later is not read. Raises NotFound, PermissionDenied.
    """
    fd = _open(
        path, uid
    )  # not on a thread: cancelled meanwhile, it would leave the descriptor open
    partial = b""
    try:
        while True:
            over = is_over()  # asked before reading: what was written until then is still delivered
            data = await asyncio.to_thread(os.pread, fd, BLOCK_BYTES, offset)
            offset += len(data)
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
            if len(partial) >= MAX_LINE_BYTES:
                yield partial.decode(errors="replace")
                partial = b""
            if data:
                continue
            if over:
                break
            await asyncio.sleep(FOLLOW_INTERVAL_S)
        if partial:
            yield partial.decode(errors="replace")
    finally:
        os.close(fd)
