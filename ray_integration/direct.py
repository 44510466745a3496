"""Large buffers copied once, by the proxy, between its memory and its host's (``process_vm_readv``, ``_writev``).

A socket copies twice, into the kernel and out of it. The kernel lets a process do this with another of its user unless
the system forbids it (Yama's ptrace_scope); then everything goes through the socket. Which process the other end is, is
the kernel's word (SO_PEERCRED), and it is proved by reading a token there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

_TOKEN_BYTES: Final = 16
#: One thread copies at least so much, and at most so many copy one buffer.
_PART_BYTES: Final = 8 * 1024 * 1024
_MAX_THREADS: Final = 4


@functools.cache
def _threads() -> int:
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


@functools.cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MAX_THREADS - 1, thread_name_prefix="gpusched-copy")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of the stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_libc: Final = ctypes.CDLL(None, use_errno=True)
for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        *(ctypes.c_int, ctypes.POINTER(_Iovec), ctypes.c_ulong),
        *(ctypes.POINTER(_Iovec), ctypes.c_ulong, ctypes.c_ulong),
    )


def address_of(buffer: memoryview) -> int:
    """Where its memory is, read-only memory too. It stays there for as long as somebody holds the buffer."""
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), 0)
    try:
        return int(view.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


class Peer:
    """The memory of the process at the other end of a connection. Raises OSError when that has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def read(self, targets: Sequence[memoryview], addresses: Sequence[int]) -> None:
        """Fills ``targets`` from there."""
        for target, address in zip(targets, addresses, strict=True):
            self._copy(_libc.process_vm_readv, target, address)

    def write(self, sources: Sequence[memoryview], addresses: Sequence[int]) -> None:
        """Writes ``sources`` there."""
        for source, address in zip(sources, addresses, strict=True):
            self._copy(_libc.process_vm_writev, source, address)

    def _copy(self, function: ctypes._FuncPointer, own: memoryview, address: int) -> None:
        at, size = address_of(own), own.nbytes
        part = max(_PART_BYTES, -(-size // _threads()))
        parts = [(start, min(part, size - start)) for start in range(0, size, part)]
        waiting = [
            _executor().submit(self._copy_part, function, at + start, address + start, length)
            for start, length in parts[1:]
        ]
        try:
            self._copy_part(function, at, address, parts[0][1])
        finally:
            wait(waiting)  # they use the buffer
        for each in waiting:
            each.result()

    def _copy_part(self, function: ctypes._FuncPointer, own: int, address: int, size: int) -> None:
        done = 0
        while done < size:  # a call copies at most 2 GiB
            here = _Iovec(own + done, size - done)
            there = _Iovec(address + done, size - done)
            copied = function(self.pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if copied <= 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            done += copied


class Token:
    """What one end shows, so that the other can prove that it sees the right process."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(_TOKEN_BYTES)
        self._memory = bytearray(self._secret)

    def shown(self) -> tuple[int, bytes]:
        return address_of(memoryview(self._memory)), self._secret


def prove(sock: socket.socket, shown: tuple[int, bytes]) -> Peer | None:
    """The peer's memory, if it may be reached and is what ``shown`` says; else None."""
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    address, secret = shown
    seen = bytearray(len(secret))
    peer = Peer(pid)
    try:
        peer.read([memoryview(seen)], [address])
        peer.write([memoryview(seen)], [address])
    except OSError:
        return None
    return peer if bytes(seen) == secret else None
