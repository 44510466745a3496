"""The asyncio side of the SDK: connections that are awaited, and the pool that a client asks through.

Covers: timeouts, cancelling, retries, reuse of connections. The blocking twin is ``_sync_io.py``.

Plain non-blocking sockets, no asyncio streams: nothing here is bound to one event loop or limits the length of a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from typing import Any, TypeVar

from gpusched import _requests
from gpusched._channel import CHUNK_BYTES, Channel, Lost, check_peer

T = TypeVar("T")

#: Seconds between tries while the daemon's queue of connections is full: a Unix socket cannot be waited for then.
RETRY_CONNECT_S = 0.01


class Connection(Channel):
    """A channel whose waits are awaited. An ``ask`` that was cancelled leaves it useless; ``read_line`` does not."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, path: str) -> Connection:
        """Connects and checks the peer. Raises DaemonUnavailable or PermissionDenied."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(_requests.CONNECT_TIMEOUT_S):
                while True:
                    with contextlib.suppress(BlockingIOError):
                        sock.connect(path)
                        break
                    await asyncio.sleep(RETRY_CONNECT_S)
            check_peer(sock, path)
        except OSError as error:
            sock.close()
            raise _requests.unreachable(path, error) from error
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def ask(self, line: bytes) -> bytes:
        """Sends one line and waits for the next. Raises Lost."""
        sent = self.send_some(line)
        try:
            if sent < len(line):
                await asyncio.get_running_loop().sock_sendall(self._sock, line[sent:])
            return await self.read_line()
        except (Lost, ConnectionError):
            raise Lost(sent=True) from None

    async def read_line(self) -> bytes:
        """Raises Lost. Nothing is lost when it is cancelled."""
        while (line := self.take_line()) is None:
            try:
                data = self._sock.recv(CHUNK_BYTES)
            except BlockingIOError:
                # Not loop.sock_recv(): cancelled at the wrong moment it drops what it has read.
                await self._readable()
                continue
            except OSError:
                raise Lost(sent=True) from None
            self.received(data)
        return line

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        loop.add_reader(self._sock, self._wake)
        try:
            await self._waiter
        finally:
            if self._waiter is not None:
                self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.get_loop().remove_reader(self._sock)
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Also ends a ``read_line`` that waits, with Lost."""
        self._wake()  # before the descriptor's number can be somebody else's
        super().close()

    async def finish(self) -> None:
        """Ends the conversation and waits until the daemon knows it, which ends this connection's leases."""
        try:
            if self.is_own:
                with contextlib.suppress(Lost, TimeoutError):
                    self.half_close()
                    async with asyncio.timeout(_requests.CONNECT_TIMEOUT_S):
                        while True:
                            await self.read_line()
        finally:
            self.close()


class Pool:
    """Connections to one daemon. Tasks may share it: each waiting call has a connection of its own."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._idle: list[Connection] = []

    def __len__(self) -> int:
        return len(self._idle)

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def open(self) -> Connection:
        """A new connection, which the caller keeps."""
        return await Connection.open(self.path)

    async def send(self, request: _requests.Request[T], timeout_s: float | None = None) -> T:
        """Asks once, and once more where the first connection broke and asking twice does no harm."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        connection = await self._take()
        try:
            response = await self._exchange(connection, request, limit_s)
        except Lost as lost:
            if not _requests.may_repeat(request.method, sent=lost.sent):
                raise _requests.gone(request.method, self.path) from lost
            connection = await self.open()
            try:
                response = await self._exchange(connection, request, limit_s)
            except Lost as again:
                raise _requests.gone(request.method, self.path) from again
        if len(self._idle) < _requests.MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()
        return _requests.result_of(request, response)

    async def ask_on(self, connection: Connection, request: _requests.Request[T]) -> T:
        """Asks on a connection that the caller keeps; never twice."""
        try:
            response = await self._exchange(connection, request, self.timeout_s)
        except Lost as lost:
            raise _requests.gone(request.method, self.path) from lost
        return _requests.result_of(request, response)

    async def _take(self) -> Connection:
        """An idle connection that still works, else a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet:
                return connection
            connection.close()
        return await self.open()

    async def _exchange(
        self, connection: Connection, request: _requests.Request[Any], limit_s: float
    ) -> dict[str, Any]:
        """One request and its response. On any exception, also when cancelled, the connection is closed: an answer
        may still come.
        """
        request_id = next(self._ids)
        try:
            line = _requests.encode(request, request_id)
            async with asyncio.timeout(limit_s):
                answer = await connection.ask(line)
            return _requests.decode_response(answer, request_id)
        except TimeoutError:
            connection.close()
            raise _requests.timed_out(request.method, limit_s) from None
        except BaseException:
            connection.close()
            raise
