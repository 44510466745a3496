"""The engine's durable memory: an append-only file of checksummed JSON lines, fsynced before anyone relies on it.

Appending costs one write and one fdatasync, shared by all records that wait at that moment. A torn last line (the
machine died while writing) is dropped: nobody was told that it was recorded. Anything else that does not read makes
the whole journal unreadable, and recovery goes by the supervisors' own records instead.

    3f2a9c01 {"v":1,"backend":"cuda"}
    77b01c44 {"proc":{...}}
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import msgspec

from gpusched import errors

VERSION: Final = 1
_Act = Callable[[bytes], None]


class JournalUnreadable(Exception):
    """The journal exists but cannot be trusted; the text says why."""


def encode_record(record: Mapping[str, object]) -> bytes:
    body = msgspec.json.encode(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode_records(data: bytes) -> list[dict[str, Any]]:
    """The records of a journal's bytes; a torn last line is dropped. Raises JournalUnreadable."""
    *lines, rest = data.split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        checksum, _, body = line.partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(body):
                raise ValueError("checksum")
            records.append(msgspec.json.decode(body, type=dict[str, Any]))
        except ValueError as error:
            # A torn write can only be the last thing in the file.
            if number == len(lines) and not rest:
                break
            raise JournalUnreadable(f"line {number} is damaged ({error})") from None
    return records


def read(path: Path) -> list[dict[str, Any]]:
    """All records, header first; an empty list where there is no journal yet. Raises JournalUnreadable."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    records = decode_records(data)
    if records and records[0].get("v") != VERSION:
        raise JournalUnreadable(f"version {records[0].get('v')!r} is not {VERSION}")
    if not records and data:
        raise JournalUnreadable("no readable header")
    return records


class FileJournal:
    """Implements ``ports.Journal``. One writer thread; appends that arrive meanwhile share the next fsync."""

    def __init__(self, path: Path, backend: str) -> None:
        self._path = path
        self._header = {"v": VERSION, "backend": backend}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._pending: list[tuple[_Act, bytes, asyncio.Future[None]]] = []
        self._draining = False
        self._fd = -1
        self._size = 0

    @property
    def size_bytes(self) -> int:
        return self._size

    async def rewrite(self, records: Iterable[Mapping[str, object]]) -> None:
        """Replaces the whole journal in one atomic step. Raises InsufficientDisk; the old one is then intact."""
        await self._enqueue(self._replace, (self._header, *records))

    async def append(self, *records: Mapping[str, object]) -> None:
        await self._enqueue(self._write, records)

    async def _enqueue(self, act: _Act, records: Iterable[Mapping[str, object]]) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._pending.append((act, b"".join(encode_record(r) for r in records), future))
        if not self._draining:
            self._draining = True
            self._drain_next(loop)
        await future

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _drain_next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Writes what waits, in order: a rewrite alone, appends together."""
        if not self._pending:
            self._draining = False
            return
        act = self._pending[0][0]
        alone = act == self._replace
        batch = (
            self._pending[:1] if alone else list(takewhile(lambda p: p[0] == act, self._pending))
        )
        del self._pending[: len(batch)]
        written = loop.run_in_executor(self._thread, act, b"".join(part for _, part, _ in batch))

        def finished(done: asyncio.Future[None]) -> None:
            error = done.exception()
            for _, _, future in batch:
                if future.done():
                    continue  # its waiter was cancelled
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
            self._drain_next(loop)

        written.add_done_callback(finished)

    # -- on the writer thread ---------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        try:
            if self._fd < 0:  # the first rewrite has not succeeded yet
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._cut()
            _write_whole(self._fd, data)
            os.fdatasync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):  # then the next append cuts it off
                self._cut()
            raise self._mapped(error) from error
        self._size += len(data)

    def _cut(self) -> None:
        """Never leaves half a record before the next one."""
        if os.fstat(self._fd).st_size != self._size:
            os.ftruncate(self._fd, self._size)

    def _replace(self, data: bytes) -> None:
        fresh = self._path.with_suffix(".new")
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(fresh.unlink, missing_ok=True)  # on a full disk its bytes are missed
                fd = os.open(
                    fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
                )
                undo.callback(os.close, fd)
                _write_whole(fd, data)
                os.fsync(fd)
                fresh.rename(self._path)
                undo.pop_all()
            # From here on this is the journal, whatever else fails: appends must not go to a file without a name.
            old, self._fd, self._size = self._fd, fd, len(data)
            if old >= 0:
                os.close(old)
            _sync_directory(self._path.parent)
        except OSError as error:
            raise self._mapped(error) from error

    def _mapped(self, error: OSError) -> errors.InsufficientDisk:
        return errors.InsufficientDisk(
            f"cannot record this in {self._path}: {error.strerror}; free some space and try again. "
            "Nothing was changed.",
            {"path": str(self._path), "errno": error.errno},
        )


def _write_whole(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
