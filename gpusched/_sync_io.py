"""The blocking side of the SDK: connections that wait, and the pool that a client asks through.

Covers: deadlines, retries, reuse of connections. Does not cover: what is asked (``_requests.py``) or the client's
methods (``client.py``). The asyncio twin is ``_async_io.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from typing import Any, TypeVar

from gpusched import _requests
from gpusched._channel import CHUNK_BYTES, Channel, Lost, check_peer

T = TypeVar("T")


class Connection(Channel):
    """A channel that blocks. Deadlines are ``time.monotonic()`` seconds; None waits for ever."""

    @classmethod
    def open(cls, path: str) -> Connection:
        """Connects and checks the peer. Raises DaemonUnavailable or PermissionDenied."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A full queue makes connect() wait for SO_SNDTIMEO; with settimeout() it would fail at once.
            seconds, rest = divmod(_requests.CONNECT_TIMEOUT_S, 1)
            limit = struct.pack("ll", int(seconds), int(rest * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.connect(path)
            check_peer(sock, path)
        except OSError as error:
            sock.close()
            raise _requests.unreachable(path, error) from error
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def ask(self, line: bytes, deadline: float) -> bytes:
        """Sends one line and waits for the next. Raises Lost and TimeoutError; then it must not be used again."""
        self._wait_until(deadline)
        sent = self.send_some(line)
        try:
            while sent < len(line):
                self._wait_until(deadline)
                sent += self.send_some(line[sent:])
            return self.read_line(deadline)
        except Lost:
            raise Lost(sent=True) from None

    def read_line(self, deadline: float | None) -> bytes:
        """Raises Lost and TimeoutError."""
        while (line := self.take_line()) is None:
            self._wait_until(deadline)
            try:
                data = self._sock.recv(CHUNK_BYTES)
            except TimeoutError:
                raise
            except OSError:
                raise Lost(sent=True) from None
            self.received(data)
        return line

    def finish(self) -> None:
        """Ends the conversation and waits until the daemon knows it, which ends this connection's leases."""
        if self.is_own:
            with contextlib.suppress(Lost, TimeoutError):
                self.half_close()
                deadline = time.monotonic() + _requests.CONNECT_TIMEOUT_S
                while True:
                    self.read_line(deadline)
        self.close()

    def _wait_until(self, deadline: float | None) -> None:
        """Limits the next wait. Raises TimeoutError when there is no time left, Lost after ``close``."""
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        try:
            self._sock.settimeout(remaining)
        except OSError:
            raise Lost(sent=False) from None


class Pool:
    """Connections to one daemon. Threads may share it: each waiting call has a connection of its own."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._ids = itertools.count(1)
        # Shared by threads without a lock: append() and pop() of a list are atomic.
        self._idle: list[Connection] = []

    def __len__(self) -> int:
        return len(self._idle)

    def close(self) -> None:
        """Closes the idle connections."""
        while (connection := self._pop()) is not None:
            connection.close()

    def open(self) -> Connection:
        """A new connection, which the caller keeps."""
        return Connection.open(self.path)

    def send(self, request: _requests.Request[T], timeout_s: float | None = None) -> T:
        """Asks once, and once more where the first connection broke and asking twice does no harm."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        connection = self._take()
        try:
            response = self._exchange(connection, request, limit_s)
        except Lost as lost:
            if not _requests.may_repeat(request.method, sent=lost.sent):
                raise _requests.gone(request.method, self.path) from lost
            connection = self.open()
            try:
                response = self._exchange(connection, request, limit_s)
            except Lost as again:
                raise _requests.gone(request.method, self.path) from again
        if len(self._idle) < _requests.MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()
        return _requests.result_of(request, response)

    def ask_on(self, connection: Connection, request: _requests.Request[T]) -> T:
        """Asks on a connection that the caller keeps; never twice."""
        try:
            response = self._exchange(connection, request, self.timeout_s)
        except Lost as lost:
            raise _requests.gone(request.method, self.path) from lost
        return _requests.result_of(request, response)

    def _take(self) -> Connection:
        """An idle connection that still works, else a new one."""
        while (connection := self._pop()) is not None:
            if connection.is_quiet:
                return connection
            connection.close()
        return self.open()

    def _pop(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _exchange(
        self, connection: Connection, request: _requests.Request[Any], limit_s: float
    ) -> dict[str, Any]:
        """One request and its response. On any exception the connection is closed: an answer may still come."""
        request_id = next(self._ids)
        try:
            line = _requests.encode(request, request_id)
            answer = connection.ask(line, time.monotonic() + limit_s)
            return _requests.decode_response(answer, request_id)
        except TimeoutError:
            connection.close()
            raise _requests.timed_out(request.method, limit_s) from None
        except BaseException:
            connection.close()
            raise
