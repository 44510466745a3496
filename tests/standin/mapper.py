"""Makes, maps and shares physical memory by itself, without pause, and checks all of it; see ``test_direct_mapped.py``.

mapper.py KIND PIECES [SEED]      prints "step N"; "WRONG ..." and exit status 3 where it is not right

    random      in so many threads every call that there is, at random: several mappings of one piece, parts of it,
                handles that are released and retained, also of what cuMemAlloc made
    many        so many small pieces, side by side in one range, each written in every step
    exporting   as many; the first two are shared, by handle and by their addresses
    importing   as many; and has memory of somebody else mapped, which is its own
    forking     as many; with a child that does nothing
    peers       as many by cuMemAlloc on each of two devices, copied to and fro
    capturing   as many; and captures graphs, which may not be waited for meanwhile
    ipc         as many; and tries to share memory of cuMemAlloc, and has a handle open in every other second
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_uint64, c_ulonglong, c_void_p
from typing import Any

PAGE = 2 << 20
READ, WRITE = 1, 3
MOST_PIECES, MOST_BYTES = 12, 3 * PAGE
cuda = ctypes.CDLL("libcuda.so.1")


class Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class Properties(ctypes.Structure):
    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("metadata", c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class Access(ctypes.Structure):
    _fields_ = (("location", Location), ("flags", c_int))


def fail(*what: object) -> None:
    print("WRONG", *what, flush=True)
    os._exit(3)


def call(name: str, *arguments: Any) -> None:
    result = getattr(cuda, name)(*arguments)
    if result:
        fail(name, "result", result)


def create(size: int, *, handle_types: int = 0, rdma: int = 0) -> int:
    handle = c_ulonglong()
    wish = Properties(1, handle_types, Location(1, 0), None, 0, rdma)
    call("cuMemCreate", byref(handle), c_size_t(size), byref(wish), c_ulonglong(0))
    return handle.value


def reserve(size: int) -> int:
    address = c_ulonglong()
    call(
        "cuMemAddressReserve",
        byref(address),
        c_size_t(size),
        c_size_t(0),
        c_ulonglong(0),
        c_ulonglong(0),
    )
    return address.value


def map_(address: int, size: int, offset: int, handle: int) -> None:
    arguments = c_ulonglong(address), c_size_t(size), c_size_t(offset), c_ulonglong(handle)
    call("cuMemMap", *arguments, c_ulonglong(0))


def unmap(address: int, size: int) -> None:
    call("cuMemUnmap", c_ulonglong(address), c_size_t(size))


def release(handle: int) -> None:
    call("cuMemRelease", c_ulonglong(handle))


def retain(address: int) -> int:
    handle = c_ulonglong()
    call("cuMemRetainAllocationHandle", byref(handle), c_void_p(address))
    return handle.value


def allow(address: int, size: int, flags: int, device: int = 0) -> None:
    access = Access(Location(1, device), flags)
    call("cuMemSetAccess", c_ulonglong(address), c_size_t(size), byref(access), c_size_t(1))


def allowed(address: int, device: int = 0) -> int:
    flags = c_ulonglong(99)
    call("cuMemGetAccess", byref(flags), byref(Location(1, device)), c_ulonglong(address))
    return flags.value


def write(address: int, value: int) -> None:
    data = c_uint64(value)
    call("cuMemcpyHtoDAsync_v2", c_ulonglong(address), byref(data), c_size_t(8), None)


def read(address: int) -> int:
    data = c_uint64()
    call("cuMemcpyDtoHAsync_v2", byref(data), c_ulonglong(address), c_size_t(8), None)
    return data.value


class Mapping:
    def __init__(self, piece: Piece, address: int, size: int, offset: int) -> None:
        self.piece, self.address, self.size, self.offset = piece, address, size, offset
        self.flags = [0, 0]


class Piece:
    """What one allocation should be: the value at the beginning of each of its pages, and who refers to it."""

    def __init__(self, size: int, rdma: int, *, by_alloc: bool) -> None:
        self.rdma, self.own, self.handle_types = rdma, 0, 0
        if by_alloc:
            address = c_ulonglong()
            call("cuMemAlloc_v2", byref(address), c_size_t(size))
            self.own, self.rdma, self.handle_types = address.value, 0, 1
            self.handle = retain(self.own)
        else:
            self.handle = create(size, rdma=rdma)
        self.references, self.values = 1, [0] * (size // PAGE)
        self.mappings: list[Mapping] = []


class Random:
    """A model of what there is, and the calls that change it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pieces: list[Piece] = []
        self.range, self.spare = reserve(64 * PAGE), set(range(64))

    def step(self) -> None:
        steps = [self.make, self.map, self.unmap, self.allow, self.release, self.retain, self.write]
        self.rng.choice([*steps, self.free, self.map, self.allow, self.write, self.write])()
        self.pieces = [p for p in self.pieces if p.references or p.mappings or p.own]

    def make(self) -> None:
        if len(self.pieces) < MOST_PIECES:
            size = self.rng.randrange(PAGE, MOST_BYTES + 1, PAGE)
            by_alloc = self.rng.randrange(4) == 0
            self.pieces.append(Piece(size, self.rng.randrange(2), by_alloc=by_alloc))

    def free(self) -> None:
        piece = self.a_piece(named=False)
        if piece is not None and piece.own and (piece is not self.pieces[0] or piece.references):
            call("cuMemFree_v2", c_ulonglong(piece.own))
            piece.own = 0

    def a_piece(self, *, named: bool) -> Piece | None:
        found = [p for p in self.pieces if bool(p.references) or not named]
        return self.rng.choice(found) if found else None

    def a_mapping(self) -> Mapping | None:
        found = [m for piece in self.pieces for m in piece.mappings]
        return self.rng.choice(found) if found else None

    def map(self) -> None:
        piece = self.a_piece(named=True)
        if piece is None:
            return
        first = self.rng.randrange(len(piece.values))
        pages = self.rng.randint(1, len(piece.values) - first)
        places = [p for p in self.spare if self.spare >= set(range(p, p + pages))]
        if places:
            place = self.rng.choice(places)
            self.spare -= set(range(place, place + pages))
            mapping = Mapping(piece, self.range + place * PAGE, pages * PAGE, first * PAGE)
            map_(mapping.address, mapping.size, mapping.offset, piece.handle)
            piece.mappings.append(mapping)

    def unmap(self) -> None:
        mapping = self.a_mapping()
        if mapping is not None:
            unmap(mapping.address, mapping.size)
            place = (mapping.address - self.range) // PAGE
            self.spare |= set(range(place, place + mapping.size // PAGE))
            mapping.piece.mappings.remove(mapping)

    def allow(self) -> None:
        """For one mapping, or for two neighbours at once."""
        first = self.a_mapping()
        if first is None:
            return
        found = [
            m for p in self.pieces for m in p.mappings if m.address == first.address + first.size
        ]
        flags, device = self.rng.choice((0, READ, WRITE, WRITE, WRITE)), self.rng.choice((0, 0, 1))
        allow(first.address, first.size + sum(m.size for m in found), flags, device)
        for mapping in (first, *found):
            mapping.flags[device] = flags

    def release(self) -> None:
        """But never all of them: there is something to move at any time."""
        piece = self.a_piece(named=True)
        if piece is not None and (piece is not self.pieces[0] or piece.references > 1):
            release(piece.handle)
            piece.references -= 1

    def retain(self) -> None:
        mapping = self.a_mapping()
        if mapping is None:
            return
        handle = retain(mapping.address + mapping.size - 8)
        piece = mapping.piece
        if piece.references and handle != piece.handle:
            fail("handle", piece.handle, handle)
        piece.handle = handle
        piece.references += 1

    def write(self) -> None:
        mapping = self.a_mapping()
        if mapping is not None and mapping.flags[0] == WRITE:
            page = self.rng.randrange(mapping.size // PAGE)
            value = self.rng.randrange(1 << 62)
            write(mapping.address + page * PAGE, value)
            mapping.piece.values[mapping.offset // PAGE + page] = value

    def check(self) -> None:
        names = [piece.handle for piece in self.pieces if piece.references]
        if len(names) != len(set(names)):
            fail("two of one name", names)
        for piece in self.pieces:
            if piece.references:
                self._check_properties(piece)
            for mapping in piece.mappings:
                self._check_mapping(mapping)
            for page, value in enumerate(piece.values if piece.own else ()):
                if read(piece.own + page * PAGE) != value:
                    fail("contents of", piece.own, "at page", page)

    def _check_properties(self, piece: Piece) -> None:
        found = Properties()
        call("cuMemGetAllocationPropertiesFromHandle", byref(found), c_ulonglong(piece.handle))
        if (found.handle_types, found.rdma) != (piece.handle_types, piece.rdma):
            fail("properties", found.handle_types, found.rdma)

    def _check_mapping(self, mapping: Mapping) -> None:
        for device in (0, 1):
            if allowed(mapping.address, device) != mapping.flags[device]:
                fail("access of", device, allowed(mapping.address, device), mapping.flags[device])
        for page in range(mapping.size // PAGE if mapping.flags[0] else 0):
            found = read(mapping.address + page * PAGE)
            if found != mapping.piece.values[mapping.offset // PAGE + page]:
                fail("contents", found, "at page", page)


class Many:
    """So many pieces of one page each, as an allocator makes them that grows its segments."""

    def __init__(self, count: int, handle_types: int = 0) -> None:
        self.count, self.begin = count, reserve(count * PAGE)
        self.handles = [create(PAGE, handle_types=handle_types) for _ in range(count)]
        for number, handle in enumerate(self.handles):
            map_(self.begin + number * PAGE, PAGE, 0, handle)
        allow(self.begin, count * PAGE, WRITE)
        self.number = 0

    def step(self) -> None:
        for page in range(self.count):
            write(self.begin + page * PAGE, self.number << 20 | page)
        for page in range(self.count):
            if read(self.begin + page * PAGE) != self.number << 20 | page:
                fail("contents of", page, "at step", self.number)
        self.number += 1

    def check(self) -> None:
        pass


def exported(handle: int) -> int:
    fd = c_int(-1)
    call("cuMemExportToShareableHandle", byref(fd), c_ulonglong(handle), 1, c_ulonglong(0))
    return fd.value


class Exporting(Many):
    def __init__(self, count: int) -> None:
        super().__init__(count, handle_types=1)
        self.fd = exported(self.handles[0])
        fd = c_int()
        second = c_ulonglong(self.begin + PAGE), c_size_t(PAGE)
        call("cuMemGetHandleForAddressRange", byref(fd), *second, 1, c_ulonglong(0))

    def check(self) -> None:
        """Whoever has the descriptor sees what is written: it is the same memory still."""
        there = int.from_bytes(os.pread(self.fd, 8, 0), "little")
        if there != read(self.begin):
            fail("shared", there, read(self.begin))


class Importing(Many):
    def __init__(self, count: int) -> None:
        super().__init__(count, handle_types=1)
        handle, self.imported = c_ulonglong(), reserve(PAGE)
        fd = exported(self.handles[0])
        call("cuMemImportFromShareableHandle", byref(handle), c_void_p(fd), 1)
        map_(self.imported, PAGE, 0, handle.value)
        allow(self.imported, PAGE, READ)

    def check(self) -> None:
        if read(self.imported) != read(self.begin):
            fail("imported")


class Forking(Many):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        if os.fork() == 0:
            while os.getppid() != 1:
                time.sleep(0.1)
            os._exit(0)


class Capturing(Many):
    def step(self) -> None:
        call("cuStreamBeginCapture_v2", None, 0)
        self._capture()
        call("cuStreamBeginCaptureToGraph", None, None, None, None, c_size_t(0), 0)
        self._capture()

    def _capture(self) -> None:
        time.sleep(0.005)
        super().step()
        call("cuStreamEndCapture", None, byref(c_void_p()))


class Peers:
    """Memory of cuMemAlloc on two devices, and copies from each to the other, in a context of either."""

    def __init__(self, count: int) -> None:
        self.memory = [self._make(0, count)]
        self.memory.append(self._make(1, count))
        self.memory[0] += self._make(0, count)
        self.memory[1] += self._make(1, count)
        ended, address = c_void_p(), c_ulonglong()
        call("cuCtxCreate_v2", byref(ended), 0, 0)
        call("cuMemAlloc_v2", byref(address), c_size_t(PAGE))
        call("cuCtxDestroy_v2", ended)
        self.number = 0

    def _make(self, device: int, count: int) -> list[int]:
        use(device)
        addresses = []
        for _ in range(count):
            address = c_ulonglong()
            call("cuMemAlloc_v2", byref(address), c_size_t(PAGE))
            addresses.append(address.value)
        return addresses

    def step(self) -> None:
        self.number += 1
        for number, (here, there) in enumerate(zip(*self.memory, strict=True)):
            write(here, self.number << 20 | number)
            for device, (target, source) in enumerate(((there, here), (here, there))):
                use(device)
                pair = c_ulonglong(target), c_ulonglong(source)
                call("cuMemcpyDtoDAsync_v2", *pair, c_size_t(PAGE), None)
            if {read(here), read(there)} != {self.number << 20 | number}:
                fail("copied", read(here), read(there))

    def check(self) -> None:
        pass


def use(device: int) -> None:
    context = c_void_p()
    call("cuDevicePrimaryCtxRetain", byref(context), device)
    call("cuCtxSetCurrent", context)


class IpcHandle(ctypes.Structure):
    _fields_ = (("words", c_ulonglong * 8),)


class Ipc(Many):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.ours, theirs, self.handle = c_ulonglong(), c_ulonglong(), IpcHandle()
        call("cuMemAlloc_v2", byref(self.ours), c_size_t(PAGE))
        call("cuMemAlloc_v2", byref(theirs), c_size_t(PAGE // 2))
        call("cuIpcGetMemHandle", byref(self.handle), theirs)
        self.opened: c_ulonglong | None = None

    def check(self) -> None:
        for _ in range(2):
            if cuda.cuIpcGetMemHandle(byref(IpcHandle()), self.ours) != 1:
                fail("shared what cannot be shared")
        event = c_ulonglong()
        call("cuIpcOpenEventHandle", byref(event), self.handle)
        wanted = int(time.monotonic()) % 2 == 0
        if wanted and self.opened is None:
            self.opened = c_ulonglong()
            call("cuIpcOpenMemHandle_v2", byref(self.opened), self.handle, 1)
        elif not wanted and self.opened is not None:
            call("cuIpcCloseMemHandle", self.opened)
            self.opened = None


KINDS: dict[str, Callable[[int], Many | Peers]] = {
    "many": Many,
    "exporting": Exporting,
    "importing": Importing,
    "forking": Forking,
    "capturing": Capturing,
    "ipc": Ipc,
    "peers": Peers,
}


def work(made: Random | Many | Peers, every: int, *, report: bool) -> None:
    use(0)
    for number in itertools.count(1):
        made.step()
        if number % every == 0:
            made.check()
            if report:
                print("step", number, flush=True)


def main() -> None:
    kind, count = sys.argv[1], int(sys.argv[2])
    call("cuInit", 0)
    use(0)
    if kind == "random":
        for number in range(1, count):
            other = Random(int(sys.argv[3]) + number)
            threading.Thread(
                target=work, args=(other, 10), kwargs={"report": False}, daemon=True
            ).start()
        work(Random(int(sys.argv[3])), 10, report=True)
    work(KINDS[kind](count), 1, report=True)


main()
