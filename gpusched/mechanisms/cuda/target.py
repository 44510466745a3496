"""One process that has ``libgpusched_direct`` in it: finding its control thread, and asking it.

Covers: the file that it is found by, the requests of ``native/control.c``, and what may be believed of the answers.
Does not cover: in which order they are asked (``direct.py``).

The process is a stranger: its answers are checked for form and bounds, and nothing of them is used as a path. It may
answer late, never, or wrongly; then an error is raised, and the phase in its page says as much as there is to know.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final, Self

from gpusched import errors
from gpusched.units import GIB

_PAGE_LINK: Final = "/memfd:gpusched-direct"
_MAGIC: Final = 0x47534431
_VERSION: Final = 1
#: Magic, version, daemon's end, own end, phase, cancel; shelter's address and bytes; absorbed, imports.
_PAGE: Final = struct.Struct("<6I2Q2I")
_CANCEL_OFFSET, _ABSORBED_OFFSET = 20, 40
_REQUEST: Final = struct.Struct("<4IQ")
_REPLY: Final = struct.Struct("<2IiIIIQQ")
_ITEM: Final = struct.Struct("<3Q16s")
_BATCH: Final = 64
#: More than a GPU can hold, in places of the table and in bytes.
_MOST_PLACES: Final = 1 << 22
_MOST_BYTES: Final = 4096 * GIB
_LEAST_BYTES_S: Final = 200e6
#: Gone, or another user's, or a kernel before 5.6: then nothing of it was ever taken.
_NOT_OURS: Final = {errno.ENOENT, errno.ESRCH, errno.EPERM, errno.EACCES, errno.ENOSYS}
#: For an answer that needs nothing of the driver.
_LOOK_S: Final = 5.0
_GRANULARITY: Final = 2 << 20
#: Descriptors that are left to the program while it holds its memory by them.
_SPARE_FDS: Final = 128
_PIDFD_GETFD: Final = 438  # the same number on x86-64 and arm64
_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_ids = itertools.count(1)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Phase(IntEnum):
    """As in ``native/control.c``."""

    RUNNING = 0
    CLOSED = 1  # no thread is in the driver, the GPU has nothing to do
    PARKED = 2  # the memory has left; its addresses are kept


class Operation(IntEnum):
    """As in ``native/control.c``."""

    STATE = 0
    CLOSE = 1
    OPEN = 2
    LIST = 3
    EXPORT = 4
    HELD = 5
    PARK = 6
    DROP = 7
    CREATE = 8
    ATTACH = 9
    MAP = 10


@dataclass(frozen=True, slots=True)
class Piece:
    """One physical allocation of the process. ``gpu`` is a UUID, as NVML writes it."""

    place: int
    address: int
    size_bytes: int
    gpu: str


class Refused(Exception):
    """The process answered with an error: ``status`` is the driver's result, or minus an errno."""

    def __init__(self, operation: Operation, status: int) -> None:
        super().__init__(f"{operation.name.lower()}: {status}")
        self.operation, self.status = operation, status


class Target:
    """A conversation with one process. Use it as a context; one thread at a time."""

    def __init__(self, pid: int, channel: socket.socket, page: mmap.mmap) -> None:
        self.pid = pid
        self._channel, self._page = channel, page

    @classmethod
    def find(cls, pid: int) -> Self | None:
        """None where the process has no such library, is gone, or is none of ours.

        Raises DriverError where it has one and cannot be talked to: its memory may be parked, and then the driver
        alone must not be asked to go on with it.
        """
        try:
            number = _page_number(pid)
            if number is None:
                return None
            pidfd = os.pidfd_open(pid)
            try:
                return cls._open(pid, pidfd, number)
            finally:
                os.close(pidfd)
        except OSError as error:
            if error.errno in _NOT_OURS:
                return None
            raise errors.DriverError(
                f"process {pid} cannot be looked into: {error.strerror}", {"pid": pid}
            ) from error

    @classmethod
    def _open(cls, pid: int, pidfd: int, number: int) -> Self | None:
        page_fd = _getfd(pidfd, number)
        try:
            if os.fstat(page_fd).st_size < _PAGE.size:
                return None
            page = mmap.mmap(page_fd, _PAGE.size, mmap.MAP_SHARED)
        finally:
            os.close(page_fd)
        magic, version, daemon_end, *_ = _PAGE.unpack_from(page)
        if magic != _MAGIC:
            return None  # not yet begun, or something else of that name
        if version != _VERSION:
            raise errors.DriverError(
                f"process {pid} was started by a gpusched with another library (version {version}, not "
                f"{_VERSION}); thaw it with that one",
                {"pid": pid},
            )
        channel = socket.socket(fileno=_getfd(pidfd, daemon_end))
        if (channel.family, channel.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            channel.close()
            raise errors.DriverError(f"process {pid} has closed what it is asked by", {"pid": pid})
        return cls(pid, channel, page)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._page.close()

    @property
    def phase(self) -> Phase | None:
        """Read from the page, so also of a stopped process. None: nothing that we know."""
        number = _PAGE.unpack_from(self._page)[4]
        return Phase(number) if number <= max(Phase) else None

    # -- requests

    def close_gate(self, timeout_s: float) -> None:
        """Blocks. Raises LockTimeout, and then the process runs on: now, or as soon as its GPU work is done."""
        self._cancel(False)
        try:
            self._ask(Operation.CLOSE, timeout_s, argument=max(1, round(timeout_s * 1000)))
        except TimeoutError:
            self._cancel(True)
            raise _not_at_rest(self.pid) from None
        except Refused as error:
            raise _not_at_rest(self.pid) from error

    def open_gate(self, timeout_s: float = 5.0) -> None:
        """Raises Refused while its memory is elsewhere."""
        self._ask(Operation.OPEN, timeout_s)

    def pieces(self) -> list[Piece]:
        """All that can be moved. Raises Refused, TimeoutError."""
        return [piece for batch, _ in self._all(Operation.LIST, _LOOK_S) for piece in batch]

    def has_pieces(self) -> bool:
        """Whether anything can be moved. Raises Refused, TimeoutError."""
        return next(self._all(Operation.LIST, _LOOK_S), None) is not None

    def can_hold(self, count: int) -> bool:
        """Whether it may have so many descriptors more."""
        try:
            there = len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - the names alone
            most = _most_descriptors(Path(f"/proc/{self.pid}/limits").read_text())
        except OSError:
            return False
        return there + count + _SPARE_FDS <= most

    def export(self, *, keep: bool) -> Iterator[tuple[list[Piece], list[int]]]:
        """The memory itself, some pieces at a time, each as a descriptor that the caller closes.

        ``keep``: the process keeps all of them too, until it is told to ``drop``.
        """
        return self._all(Operation.EXPORT, 10.0, argument=int(not keep))

    def held(self) -> Iterator[tuple[list[Piece], list[int]]]:
        """As ``export``, from what the process still holds; no descriptors for a batch that it does not."""
        return self._all(Operation.HELD, 10.0)

    def create(self) -> Iterator[tuple[list[Piece], list[int]]]:
        """Fresh memory for all pieces. Raises Refused where it is not there; then nothing was taken."""
        return self._all(Operation.CREATE, 30.0)

    def park(self) -> None:
        self._ask(Operation.PARK, 30.0)

    def drop(self) -> None:
        """It holds no exported memory any more."""
        self._ask(Operation.DROP, 10.0)

    def map(self) -> None:
        """Maps what ``create`` made, while its contents may be on their way. Not needed before ``attach``."""
        self._ask(Operation.MAP, 30.0)

    def attach(self, *, fill_bytes: int = 0) -> None:
        """Maps what ``create`` made and ``map`` has not; from here on its contents are there.

        ``fill_bytes``: and fills it with so many that it has absorbed.
        """
        patience_s = 30.0 + fill_bytes / _LEAST_BYTES_S
        self._ask(Operation.ATTACH, patience_s, argument=int(fill_bytes > 0))

    # -- its own memory

    @property
    def shelter(self) -> tuple[int, int]:
        """Addresses of the process that wait for its contents, and how many; 0 where there are none."""
        _, _, _, _, _, _, address, size, _, _ = _PAGE.unpack_from(self._page)
        return address, size

    @property
    def has_absorbed(self) -> bool:
        """Its contents are in its own memory, and go where it goes."""
        return bool(_PAGE.unpack_from(self._page)[8])

    @property
    def imports(self) -> int:
        """Pieces of other processes' memory that it uses."""
        return int(_PAGE.unpack_from(self._page)[9])

    def note_absorbed(self) -> None:
        """From here on its contents are there, and nowhere else."""
        struct.pack_into("<I", self._page, _ABSORBED_OFFSET, 1)

    def write(self, offset: int, data: bytes) -> None:
        """Into its shelter, also of a stopped process. Raises DriverError."""
        address, size = self.shelter
        if offset + len(data) > size:
            raise errors.DriverError(f"process {self.pid} has no room for its contents")
        done = 0
        base = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        while done < len(data):
            local = _IoVec(base + done, len(data) - done)
            remote = _IoVec(address + offset + done, len(data) - done)
            count = _libc.process_vm_writev(
                self.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0
            )
            if count <= 0:
                reason = os.strerror(ctypes.get_errno())
                raise errors.DriverError(
                    f"the contents of process {self.pid} cannot be put into its own memory: {reason}"
                )
            done += count

    # -- the wire

    def _cancel(self, value: bool) -> None:
        struct.pack_into("<I", self._page, _CANCEL_OFFSET, value)

    def _all(
        self, operation: Operation, timeout_s: float, *, argument: int = 0
    ) -> Iterator[tuple[list[Piece], list[int]]]:
        first = 0
        while True:
            pieces, fds, following, total = self._ask(
                operation, timeout_s, argument=argument, first=first
            )
            if pieces:
                yield pieces, fds
            if following >= total:
                return
            if following <= first:
                raise errors.DriverError(f"process {self.pid} answers in circles")
            first = following

    def _ask(
        self, operation: Operation, timeout_s: float, *, argument: int = 0, first: int = 0
    ) -> tuple[list[Piece], list[int], int, int]:
        """Pieces, their descriptors, where to go on, how many places there are. Raises Refused, TimeoutError."""
        sequence = next(_ids) & 0xFFFFFFFF
        request = _REQUEST.pack(_MAGIC, sequence, operation, argument, first)
        deadline = time.monotonic() + timeout_s + 0.5
        self._channel.settimeout(timeout_s + 0.5)
        try:
            self._channel.send(request)
        except OSError as error:
            raise errors.DriverError(f"process {self.pid} cannot be asked: {error}") from error
        while True:
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data, fds, _, _ = socket.recv_fds(self._channel, 8192, _BATCH)
            except TimeoutError:
                raise
            except OSError as error:
                raise errors.DriverError(f"process {self.pid} does not answer: {error}") from error
            answered = _understand(data)
            if answered is not None and answered[0] == sequence:
                break
            _close(fds)  # an answer to somebody who is gone, or nonsense
            if not data or time.monotonic() >= deadline:
                raise errors.DriverError(f"process {self.pid} answers nonsense")
        _, status, pieces, following, total = answered
        if status != 0 or (fds and len(fds) != len(pieces)):
            _close(fds)
            raise Refused(operation, status)
        return pieces, fds, following, total


def _page_number(pid: int) -> int | None:
    """The descriptor of the page: of high numbers first, since that is where it is put. Raises OSError."""
    directory = Path(f"/proc/{pid}/fd")
    numbers = sorted((int(link.name) for link in directory.iterdir()), reverse=True)
    for number in numbers:
        with contextlib.suppress(OSError):
            if str((directory / str(number)).readlink()).startswith(_PAGE_LINK):
                return number
    return None


def _understand(data: bytes) -> tuple[int, int, list[Piece], int, int] | None:
    """Sequence, status, pieces, next, total; None for what no honest process would send."""
    if len(data) < _REPLY.size:
        return None
    magic, sequence, status, count, _, _, following, total = _REPLY.unpack_from(data)
    if magic != _MAGIC or count > _BATCH or len(data) != _REPLY.size + count * _ITEM.size:
        return None
    pieces = []
    for place, address, size, gpu in _ITEM.iter_unpack(data[_REPLY.size :]):
        if not 0 < size <= _MOST_BYTES or size % _GRANULARITY:
            return None
        pieces.append(Piece(place, address, size, f"GPU-{uuid.UUID(bytes=gpu)}"))
    if total > _MOST_PLACES:
        return None
    return sequence, status, pieces, following, total


def _most_descriptors(limits: str) -> int:
    """The hard limit, of a file ``/proc/PID/limits``; 0 where it does not say."""
    for line in limits.splitlines():
        if line.startswith("Max open files"):
            hard = line.split()[4]
            return int(hard) if hard.isdigit() else sys.maxsize
    return 0


def _getfd(pidfd: int, number: int) -> int:
    fd: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _not_at_rest(pid: int) -> errors.LockTimeout:
    return errors.LockTimeout(
        f"process {pid} did not come to rest in time and runs on; try again with a longer lock timeout",
        {"call": "gate", "pid": pid},
    )
