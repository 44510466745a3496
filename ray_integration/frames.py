"""Messages between a proxy and its model's host: frames on a Unix stream socket, blocking.

    kind (1 byte) | number of buffers (4) | call id (8) | length of the pickle (8) | length of each buffer (8 each)
    the pickle | the buffers, one after the other

Where the proxy can reach its host's memory (``direct.py``), large buffers are not in the frame. Those for the host wait
until it has said WHERE to write them, and are there when the proxy says WRITTEN; those from the host are read at the
addresses in the frame, and are the host's to reuse when the proxy says TAKEN. Both are done within ``receive``.

What is in a frame is unpickled by whoever knows what the call is, so that what cannot be unpickled fails that call
and not the connection. Both ends are of one user (``check_peer``), in one directory that nobody else may enter.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from enum import IntEnum
from typing import Any, Final, NamedTuple

from ray_integration import direct, pickling
from ray_integration.buffers import BufferPool

_HEADER: Final = struct.Struct("<BIQQ")
_LENGTH: Final = struct.Struct("<Q")
_CHUNK_BYTES: Final = 64 * 1024
#: Asked of the kernel: with its default a large payload takes a third longer.
_SOCKET_BUFFER_BYTES: Final = 4 * 1024 * 1024
_SO_SNDBUFFORCE: Final = 32
#: In the kind of a frame: its buffers are not in it.
_IS_DIRECT: Final = 0x80
#: From so many bytes on a frame's buffers are copied directly: it costs one more message.
DIRECT_BYTES: Final = 1024 * 1024
_MAX_PIECES: Final = 512  # of one sendmsg; the kernel's limit is 1024


class Kind(IntEnum):
    HELLO = 1  # proxy: which lane this connection is
    WELCOME = 2  # host: what it has in it
    INIT = 3  # proxy: the class and the arguments of its constructor
    CALL = 4  # proxy: method, args, kwargs
    RESULT = 5  # host: the value
    ERROR = 6  # host: the exception and its traceback
    ITEM = 7  # host: one item of a stream
    NEXT = 8  # proxy: another item, please
    CLOSE = 9  # proxy: no more items
    CANCEL = 10  # proxy: this call's result is not wanted any more
    END = 11  # host: the stream's end
    DIRECT = 12  # proxy: I can reach your memory
    WHERE = 13  # host: write the buffers of this frame there
    WRITTEN = 14  # proxy: they are
    TAKEN = 15  # proxy: the buffers of this frame are read


class Frame(NamedTuple):
    kind: Kind
    ident: int
    payload: bytes | memoryview
    buffers: list[memoryview]

    def load(self) -> Any:
        """The value in it. Raises what unpickling raises."""
        return pickling.loads(self.payload, self.buffers)


class ConnectionLost(Exception):
    """The other end has closed, or is gone."""


def check_peer(sock: socket.socket) -> None:
    """Raises ConnectionLost, and closes, unless the other end runs as this process's user, or as root.

    Whoever listens again after it was on disk does so as root: CRIU opens sockets before it gives up root's rights.
    """
    size = struct.calcsize("3i")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = struct.unpack("3i", raw)
    if uid not in (os.geteuid(), 0):
        sock.close()
        raise ConnectionLost(f"the other end is of uid {uid}, this process of {os.geteuid()}")


class FrameSocket:
    """One connection. One thread receives; any thread may send.

    ``receive`` and ``send`` raise ConnectionLost when the other end is gone; the connection is of no use then.
    """

    def __init__(self, sock: socket.socket, pool: BufferPool) -> None:
        self._sock = sock
        self._pool = pool
        self._send_lock = threading.Lock()
        self._buffer = bytearray(_CHUNK_BYTES)
        self._start = self._end = 0
        self._timeout_s: float | None = None
        self._peer: direct.Peer | None = None  # of a proxy that reaches its host
        self._is_reached = False  # of a host whose proxy does
        self._held: dict[int, list[memoryview]] = {}
        self._unwritten: dict[int, Frame] = {}
        for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
                break

    def reach(self, shown: tuple[int, bytes]) -> None:
        """Copies large buffers directly from now on, if the system lets us."""
        self._peer = direct.prove(self._sock, shown)
        if self._peer is not None:
            self.send(Kind.DIRECT, 0)

    def close(self) -> None:
        """Ends the connection; a thread that waits in ``receive`` gets ConnectionLost. May be called twice."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def send(self, kind: Kind, ident: int, value: object = None) -> None:
        """Pickles and sends ``value``. Blocks while the other end is slow. Raises what pickling raises: nothing is
        sent then.
        """
        self.send_encoded(self.encode(kind, ident, value))

    def encode(self, kind: Kind, ident: int, value: object) -> list[memoryview]:
        """The pieces of a frame; large ones refer to the value's own memory. Raises what pickling raises."""
        payload, buffers = pickling.dumps(value)
        lengths = b"".join(_LENGTH.pack(buffer.nbytes) for buffer in buffers)
        can_be = self._peer is not None or self._is_reached
        if can_be and sum(buffer.nbytes for buffer in buffers) >= DIRECT_BYTES:
            self._held[ident] = buffers
            if self._is_reached:
                lengths += b"".join(_LENGTH.pack(direct.address_of(each)) for each in buffers)
            head = _HEADER.pack(kind | _IS_DIRECT, len(buffers), ident, len(payload)) + lengths
            return [memoryview(head), memoryview(payload)]
        head = _HEADER.pack(kind, len(buffers), ident, len(payload)) + lengths
        if len(payload) < _CHUNK_BYTES:
            return [memoryview(head + payload), *buffers]
        return [memoryview(head), memoryview(payload), *buffers]

    def send_encoded(self, pieces: list[memoryview]) -> None:
        with self._send_lock:
            try:
                while pieces:
                    sent = self._sock.sendmsg(pieces[:_MAX_PIECES])
                    while pieces and sent >= pieces[0].nbytes:
                        sent -= pieces.pop(0).nbytes
                    if sent:
                        pieces[0] = pieces[0][sent:]
            except OSError as error:
                raise ConnectionLost(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """The next frame; None when none has begun to arrive within ``timeout_s`` seconds (None: waits for ever)."""
        while True:
            if self._start == self._end and not self._fill(timeout_s):
                return None
            code, count, ident, length = _HEADER.unpack(self._exactly(_HEADER.size))
            kind, is_direct = Kind(code & ~_IS_DIRECT), bool(code & _IS_DIRECT)
            lengths = self._numbers(count)
            addresses = self._numbers(count) if is_direct and self._peer is not None else []
            payload = self._exactly(length)
            if kind >= Kind.DIRECT:
                if (frame := self._about_buffers(kind, ident, payload)) is not None:
                    return frame
            elif not is_direct:
                return Frame(kind, ident, payload, [self._into_pool(size) for size in lengths])
            elif self._peer is not None:
                return Frame(kind, ident, payload, self._read_directly(ident, lengths, addresses))
            else:
                buffers = [self._pool.take(size) for size in lengths]
                self._unwritten[ident] = Frame(kind, ident, payload, buffers)
                self.send(Kind.WHERE, ident, [direct.address_of(buffer) for buffer in buffers])
                del buffers

    def _about_buffers(self, kind: Kind, ident: int, payload: bytes | memoryview) -> Frame | None:
        """Does what the other end needs for a frame's buffers; the frame that is complete by it, if one is."""
        match kind:
            case Kind.DIRECT:
                self._is_reached = True
            case Kind.TAKEN:
                self._held.pop(ident, None)
            case Kind.WHERE if self._peer is not None:
                try:
                    self._peer.write(self._held.pop(ident), pickling.loads(payload, []))
                except OSError as error:
                    raise ConnectionLost(str(error)) from error
                self.send(Kind.WRITTEN, ident)
            case Kind.WRITTEN:
                return self._unwritten.pop(ident)
            case _:
                pass
        return None

    def _read_directly(
        self, ident: int, lengths: list[int], addresses: list[int]
    ) -> list[memoryview]:
        assert self._peer is not None
        targets = [self._pool.take(size) for size in lengths]
        try:
            self._peer.read(targets, addresses)
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        self.send(Kind.TAKEN, ident)
        return targets

    def _numbers(self, count: int) -> list[int]:
        return [_LENGTH.unpack(self._exactly(_LENGTH.size))[0] for _ in range(count)]

    def _fill(self, timeout_s: float | None) -> bool:
        """Reads what is there into the empty buffer; False after ``timeout_s`` seconds without anything."""
        self._limit(timeout_s)
        try:
            got = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if not got:
            raise ConnectionLost("the other end has closed the connection")
        self._start, self._end = 0, got
        return True

    def _limit(self, timeout_s: float | None) -> None:
        """Limits how long a recv waits. The kernel's own limit: with settimeout() it would be the senders' as well."""
        if timeout_s != self._timeout_s:
            seconds, rest = divmod(timeout_s or 0.0, 1)
            limit = struct.pack("ll", int(seconds), int(rest * 1e6))
            with contextlib.suppress(OSError):  # closed: recv says so
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._timeout_s = timeout_s

    def _exactly(self, size: int) -> bytes | memoryview:
        """``size`` bytes, copied out."""
        have = self._end - self._start
        if have >= size:
            self._start += size
            return bytes(self._buffer[self._start - size : self._start])
        target = memoryview(bytearray(size))
        self._read_rest(target)
        return target

    def _into_pool(self, size: int) -> memoryview:
        target = self._pool.take(size)
        self._read_rest(target)
        return target

    def _read_rest(self, target: memoryview) -> None:
        """Fills ``target`` from the buffer, then straight from the socket."""
        have = min(self._end - self._start, len(target))
        target[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while have < len(target):
            self._limit(None)  # it has begun, so its sender is at it
            try:
                got = self._sock.recv_into(target[have:])
            except OSError as error:
                raise ConnectionLost(str(error)) from error
            if not got:
                raise ConnectionLost(
                    "the other end has closed the connection in the middle of a frame"
                )
            have += got
