"""JSON lines: bytes in, lines out. No I/O and standard library only, so that server and SDKs share it."""

from __future__ import annotations

import json
from typing import Any, Final

#: A line of this many bytes or more (without its newline) is refused.
MAX_LINE_BYTES: Final = 1024 * 1024


class LineTooLong(Exception):
    """The peer sent a line of MAX_LINE_BYTES or more; the stream cannot be read any further."""


class LineBuffer:
    """Cuts a byte stream into lines, however it arrives.

    >>> buffer = LineBuffer()
    >>> buffer.feed(b'{"a":1}\\n{"b"'), buffer.feed(b':2}\\n')
    ([b'{"a":1}'], [b'{"b":2}'])
    """

    def __init__(self, limit: int | None = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The complete lines so far, without newlines. Raises LineTooLong; the buffer is then unusable."""
        if b"\n" not in data:  # the rest of a long line: not searched again for each piece
            self._partial += data
            if self._limit is not None and len(self._partial) >= self._limit:
                raise LineTooLong
            return []
        *lines, rest = (self._partial + data).split(b"\n")
        if self._limit is not None and any(len(part) >= self._limit for part in (*lines, rest)):
            raise LineTooLong
        self._partial = rest
        return [bytes(line) for line in lines]


def encode(message: dict[str, Any]) -> bytes:
    """One message as one line, newline included."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
