"""The process that copies between the memory of other processes on one GPU and the pool. One for a GPU.

Run by ``mover_client``, with a socket as standard input: each request is one JSON message with descriptors, each
answer one JSON message. It has a CUDA context of its own (about 0.6 GB of VRAM) and keeps the pool registered with the
driver, which is what makes copies as fast as the bus. It keeps nothing that is not elsewhere too: whoever kills it
loses no contents.

    {"op": "open", "directory": PATH, "chunks": {NAME: BYTES}}   maps and registers chunks of the pool
    {"op": "close", "chunks": [NAME]}                            the reverse
    {"op": "stage", "slices": [[NAME, OFFSET, BYTES], ...]}      begins copying into VRAM of its own, where room is
    {"op": "take", "pieces": [...]} + descriptors                maps memory of others; each piece is one allocation
    {"op": "go", "out": true}                                    begins copying between the pool and what was taken
    {"op": "ping"}                                               answers
    {"op": "finish"}                                             waits for that; lets go of the memory

``stage`` is for the time in which the memory of the other process cannot be made yet: what the bus brings in
meanwhile is copied within the GPU afterwards, fifty times as fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from gpusched.units import MIB

_PIECE_BYTES: Final = 64 * MIB
#: VRAM that staging leaves to others.
_LEAVE_BYTES: Final = 4096 * MIB
_LEAST_STAGED: Final = 256 * MIB
_STREAMS: Final = 2
_MESSAGE_BYTES: Final = 1 << 20
_BATCH: Final = 64
_PROT, _SHARED = 3, 1
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_POPULATE_THREADS: Final = min(16, os.cpu_count() or 1)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


#: Chunk, offset, bytes.
Slice = tuple[str, int, int]


class Failure(Exception):
    """What a request failed by, in words."""


class Mover:
    """Everything that the process holds. One request at a time."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", 0)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", self._device))
        self._streams = [self._call("cuStreamCreate", 1) for _ in range(_STREAMS)]
        self._chunks: dict[str, tuple[int, int]] = {}
        self._mapped: list[tuple[int, list[tuple[int, Any]]]] = []  # address; bytes, handle
        self._taken: list[tuple[int, list[Slice]]] = []  # address, where its contents are
        self._staged: dict[str, list[tuple[int, int, int]]] = {}  # chunk -> offset, bytes, address
        self._stage = 0

    def perform(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Raises Failure."""
        begun = time.monotonic()
        match request["op"]:
            case "open":
                self._open(Path(request["directory"]), request["chunks"])
            case "close":
                for name in request["chunks"]:
                    self._close(name)
            case "stage":
                self._begin_staging(request["slices"])
            case "take":
                self._take(request["pieces"], fds)
            case "go":
                self._go(out=request["out"])
            case "finish":
                self._finish()
            case "ping":
                pass
            case other:
                raise Failure(f"no operation {other!r}")
        return {"ms": (time.monotonic() - begun) * 1000}

    def _call(self, name: str, *arguments: Any) -> Any:
        result, *values = getattr(self._cuda, name)(*arguments)
        if result != self._cuda.CUresult.CUDA_SUCCESS:
            raise Failure(f"{name}: {getattr(result, 'name', result)}")
        return values[0] if len(values) == 1 else values

    # -- the pool

    def _open(self, directory: Path, chunks: dict[str, int]) -> None:
        new = {name: size for name, size in chunks.items() if name not in self._chunks}
        mapped: dict[str, tuple[int, int]] = {}
        for name, size in new.items():
            fd = os.open(directory / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                address = _libc.mmap(None, size, _PROT, _SHARED, fd, 0)
            finally:
                os.close(fd)
            if address in {None, ctypes.c_void_p(-1).value}:
                raise Failure(f"mmap: {os.strerror(ctypes.get_errno())}")
            _libc.madvise(address, size, _MADV_HUGEPAGE)  # where the system allows
            mapped[name] = (address, size)
        with ThreadPoolExecutor(_POPULATE_THREADS) as threads:
            for failed in threads.map(_populate, mapped.values()):
                if failed:
                    for address, size in mapped.values():
                        _libc.munmap(address, size)
                    raise Failure(f"host memory: {os.strerror(failed)}")
        for name, (address, size) in mapped.items():
            self._call("cuMemHostRegister", address, size, 0)
            self._chunks[name] = (address, size)

    def _close(self, name: str) -> None:
        if name in self._chunks:
            address, size = self._chunks.pop(name)
            self._call("cuMemHostUnregister", address)
            _libc.munmap(address, size)

    # -- copying

    def _begin_staging(self, slices: list[Slice]) -> None:
        """No room is no failure: then the contents come in later, all of them over the bus."""
        total = sum(size for _, _, size in slices)
        free, _ = self._call("cuMemGetInfo")
        room = min(total, free - total - _LEAVE_BYTES)
        if room < _LEAST_STAGED:
            return
        result, stage = self._cuda.cuMemAlloc(room)
        if result != self._cuda.CUresult.CUDA_SUCCESS:
            return
        self._stage = here = int(stage)
        for chunk, offset, wanted in slices:
            size = min(wanted, self._stage + room - here)
            if size <= 0:
                break
            self._staged.setdefault(chunk, []).append((offset, size, here))
            self._transfer(here, self._host(chunk, offset, size), size, out=False)
            here += size

    def _staged_at(self, chunk: str, offset: int, size: int) -> int:
        """Where a slice was staged to; 0: not, or not all of it."""
        for begin, length, address in self._staged.get(chunk, ()):
            if begin <= offset and offset + size <= begin + length:
                return address + offset - begin
        return 0

    def _take(self, pieces: list[list[Slice]], fds: list[int]) -> None:
        if len(pieces) != len(fds):
            raise Failure(f"{len(pieces)} pieces and {len(fds)} descriptors")
        sizes = [sum(size for _, _, size in parts) for parts in pieces]
        address = self._map(fds, sizes)
        for parts, size in zip(pieces, sizes, strict=True):
            self._taken.append((address, parts))
            address += size

    def _go(self, *, out: bool) -> None:
        """In copies as long as they can be; not over two chunks, which are registered apart though side by side."""
        if self._staged:
            self._synchronize()
        copies: list[list[Any]] = []  # chunk, or "" where staged; device, source, bytes
        for address, parts in self._taken:
            device = address
            for chunk, offset, size in parts:
                staged = 0 if out else self._staged_at(chunk, offset, size)
                copy = ["", device, staged, size] if staged else None
                copy = copy or [chunk, device, self._host(chunk, offset, size), size]
                if copies and _goes_on(copies[-1], copy):
                    copies[-1][3] += size
                else:
                    copies.append(copy)
                device += size
        for chunk, device, source, size in copies:
            if chunk:
                self._transfer(device, source, size, out=out)
            else:
                self._call("cuMemcpyDtoDAsync", device, source, size, self._streams[0])
        self._taken.clear()

    def _host(self, chunk: str, offset: int, size: int) -> int:
        base, room = self._chunks[chunk]
        if offset < 0 or size < 0 or offset + size > room:
            raise Failure(f"{chunk} has no {size} bytes at {offset}")
        return base + offset

    def _transfer(self, device: int, host: int, size: int, *, out: bool) -> None:
        for number, begin in enumerate(range(0, size, _PIECE_BYTES)):
            length = min(_PIECE_BYTES, size - begin)
            stream = self._streams[number % _STREAMS]
            if out:
                self._call("cuMemcpyDtoHAsync", host + begin, device + begin, length, stream)
            else:
                self._call("cuMemcpyHtoDAsync", device + begin, host + begin, length, stream)

    def _map(self, fds: list[int], sizes: list[int]) -> int:
        """Side by side, so that access is set once for all of them, which takes the time, and copies may be long.

        A descriptor that is no such memory, or not as large as was said, is an error of the driver's.
        """
        cuda = self._cuda
        kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        total, address, end = sum(sizes), 0, 0
        parts: list[tuple[int, Any]] = []
        try:
            for fd, size in zip(fds, sizes, strict=True):
                parts.append((size, self._call("cuMemImportFromShareableHandle", fd, kind)))
            address = end = int(self._call("cuMemAddressReserve", total, 0, 0, 0))
            for size, handle in parts:
                self._call("cuMemMap", end, size, 0, handle, 0)
                end += size
            access = cuda.CUmemAccessDesc()
            access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = int(self._device)
            access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            self._call("cuMemSetAccess", address, total, [access], 1)
        except Failure:
            self._unmap(address, parts, end)
            raise
        self._mapped.append((address, parts))
        return address

    def _unmap(self, address: int, parts: list[tuple[int, Any]], end: int) -> None:
        """``end``: of what is mapped."""
        here = address
        for size, handle in parts:
            if here < end:
                self._cuda.cuMemUnmap(here, size)
            here += size
            self._cuda.cuMemRelease(handle)
        if address:
            self._cuda.cuMemAddressFree(address, sum(size for size, _ in parts))

    def abandon(self) -> None:
        """After a failure: nothing of what was begun is held any more."""
        with contextlib.suppress(Failure):
            self._finish()

    def _synchronize(self) -> None:
        for stream in self._streams:
            self._call("cuStreamSynchronize", stream)

    def _finish(self) -> None:
        try:
            self._synchronize()
        finally:
            self._taken.clear()
            self._staged.clear()
            if self._stage:
                self._cuda.cuMemFree(self._stage)
                self._stage = 0
            mapped, self._mapped = self._mapped, []
            for address, parts in mapped:
                self._unmap(address, parts, address + sum(size for size, _ in parts))


def _goes_on(last: list[Any], copy: list[Any]) -> bool:
    chunk, device, source, size = last
    return [chunk, device + size, source + size] == copy[:3]


def _populate(area: tuple[int, int]) -> int:
    """Makes all pages of it be there; an errno. A kernel before 5.14 cannot, and registering does it then."""
    if _libc.madvise(*area, _MADV_POPULATE_WRITE) == 0:
        return 0
    code = ctypes.get_errno()
    return 0 if code == 22 else code  # EINVAL


def main() -> None:
    from cuda.bindings import driver as cuda

    channel = socket.socket(fileno=os.dup(0))
    mover: Mover | None = None
    while True:
        data, fds, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, _BATCH)
        if not data:
            os._exit(0)
        try:
            mover = mover or Mover(cuda)
            answer = mover.perform(json.loads(data), fds)
        except (Failure, OSError) as error:
            answer = {"error": str(error)}
            if mover is not None:
                mover.abandon()
        finally:
            for fd in fds:
                os.close(fd)
        channel.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
