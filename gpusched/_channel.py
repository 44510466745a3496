"""One connection to the daemon: what the blocking and the asyncio client have in common.

Covers: who the peer is, lines out of bytes, and whether a connection may be used again, also after a fork.
Does not cover: waiting, which each client does in its own way; what the lines say (``_requests.py``).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from typing import Final

from gpusched import errors
from gpusched.protocol.codec import LineBuffer

CHUNK_BYTES: Final = 256 * 1024


class Lost(Exception):
    """The connection ended before the answer came; ``sent`` says whether the daemon may have seen the request."""

    def __init__(self, *, sent: bool) -> None:
        super().__init__(sent)
        self.sent = sent


def check_peer(sock: socket.socket, path: str) -> None:
    """Raises PermissionDenied unless root or the caller listens: anybody may put a socket into /tmp."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (0, os.getuid()):
        raise errors.PermissionDenied(
            f"nothing was sent: the socket {path} belongs to a process of uid {uid}, neither root nor you "
            f"(uid {os.getuid()})",
            {"socket": path, "uid": uid},
        )


class Channel:
    """A connected socket and the lines that have arrived on it. Not for two users at a time.

    After a fork the child has a copy of the descriptor, but the conversation is the parent's: the child may only
    close its copy.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pid = os.getpid()
        self._buffer = LineBuffer(limit=None)
        self._lines: deque[bytes] = deque()

    @property
    def is_own(self) -> bool:
        """Whether this process opened it."""
        return self._pid == os.getpid()

    @property
    def is_quiet(self) -> bool:
        """Whether a request can be sent: the daemon is still there, and nothing unread waits."""
        if not self.is_own or self._lines:
            return False
        try:
            self._sock.setblocking(False)
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Ends the conversation at once. May be called twice, and from another thread than the one that reads."""
        if self.is_own:
            # Not only close(): a forked child or a thread in recv() would keep the connection alive.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def __del__(self) -> None:
        self.close()

    def half_close(self) -> None:
        """Says that no more requests follow. Raises Lost."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            raise Lost(sent=False) from None

    def send_some(self, data: bytes) -> int:
        """Sends what the socket takes; returns the number of bytes. Raises Lost: then nothing was sent."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except TimeoutError:
            raise
        except OSError:
            raise Lost(sent=False) from None

    def take_line(self) -> bytes | None:
        return self._lines.popleft() if self._lines else None

    def received(self, data: bytes) -> None:
        """Takes in what recv() returned. Raises Lost at the end of the stream."""
        if not data:
            raise Lost(sent=True)
        self._lines.extend(self._buffer.feed(data))
