"""The Unix socket: JSON lines in, one answer line each, in order. Who asks is what the kernel says.

The daemon never dies of input: every line gets one answer, whatever is in it. A connection that sends a line of
1 MiB or more gets an error and is closed, because where the next line begins is unknown.
"""

from __future__ import annotations

import asyncio
import ctypes
import grp
import itertools
import json
import logging
import math
import os
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import msgspec

from gpusched import errors
from gpusched.engine.engine import Engine
from gpusched.engine.events import ConnectionClosed
from gpusched.engine.model import Caller
from gpusched.protocol import messages as m
from gpusched.protocol.codec import LineBuffer, LineTooLong
from gpusched.protocol.methods import METHODS
from gpusched.servers.binding import bind

log = logging.getLogger(__name__)

#: Connections that one ordinary user may hold: enough for every lease, too few to use up our descriptors.
CONNECTIONS_PER_UID: Final = 256
#: Of these, how many may be reading a log, with all of its answer in our memory.
LOG_READERS_PER_UID: Final = 2
#: Characters of a log that are encoded at a time.
_PIECE: Final = 65536
#: A client that does not read its answers for this long is cut off.
WRITE_TIMEOUT_S: Final = 60.0
EVENT_QUEUE: Final = 1000
#: What a client may want echoed; anything nested would only be a way to send ourselves into the deep.
_Id = str | int | float | None
_SO_PEERGROUPS: Final = 59  # not named by the socket module
_MAX_GROUPS: Final = 65536


class LogReader:
    """How the server reads logs; given by the composition root, since files are a mechanism."""

    def __init__(self, tail: Any, follow: Any) -> None:
        self.tail = tail
        self.follow = follow


class UnixServer:
    """Serves one engine at one path."""

    def __init__(self, engine: Engine, path: Path, group: str | None, logs: LogReader) -> None:
        self._engine = engine
        self._path = path
        self._group = group
        self._gid: int | None = None
        self._logs = logs
        self._ids = itertools.count(1)
        self._per_uid: Counter[int] = Counter()
        self._log_turns: dict[int, asyncio.Semaphore] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens. A path that another live daemon serves is refused; a left-over socket is replaced.

        Raises Unavailable, and InvalidRequest for a path or a group that cannot be.
        """
        self._gid = gid_of(self._group)
        self._server = await asyncio.start_unix_server(
            self._accept, sock=bind(self._path), backlog=512
        )

    async def close(self) -> None:
        """Stops listening and hangs up on everybody."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=5.0)
        self._path.unlink(missing_ok=True)

    # -- one connection ---------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        caller = self._caller(writer)
        self._connections.add(task)
        self._per_uid[caller.uid] += 1
        try:
            if self._per_uid[caller.uid] > CONNECTIONS_PER_UID and not caller.privileged:
                busy = errors.Unavailable(
                    f"uid {caller.uid} has {CONNECTIONS_PER_UID} connections already; close some"
                )
                await self._send(writer, errors.to_wire(busy))
                return
            await self._converse(reader, writer, caller)
        except (ConnectionError, TimeoutError):
            # The client is gone, or does not read: what it has not taken must not keep the connection open.
            writer.transport.abort()
        except asyncio.CancelledError:
            pass  # the daemon is closing
        finally:
            self._per_uid[caller.uid] -= 1
            if not self._per_uid[caller.uid]:
                del self._per_uid[caller.uid]
                self._log_turns.pop(caller.uid, None)
            self._engine.core.post(ConnectionClosed(connection=caller.connection))
            self._connections.discard(task)
            writer.close()

    def _caller(self, writer: asyncio.StreamWriter) -> Caller:
        sock: socket.socket = writer.get_extra_info("socket")
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("3i", raw)
        is_member = self._gid is not None and (self._gid == gid or self._gid in peer_groups(sock))
        privileged = uid in (0, os.geteuid()) or is_member
        return Caller(uid=uid, gid=gid, pid=pid, connection=next(self._ids), privileged=privileged)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: Caller
    ) -> None:
        buffer = LineBuffer()
        while data := await reader.read(65536):
            try:
                lines = buffer.feed(data)
            except LineTooLong:
                too_long = errors.InvalidRequest("a request line must be shorter than 1 MiB")
                await self._send(writer, errors.to_wire(too_long))
                return
            for line in lines:
                if not await self._serve(line, reader, writer, caller):
                    return
                await asyncio.sleep(0)  # thousands of short lines must not keep others waiting

    async def _serve(
        self,
        line: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        caller: Caller,
    ) -> bool:
        """Answers one line; False when the connection has become a stream that has ended."""
        self._engine.count_request()
        echo: dict[str, Any] = {}
        streaming = False
        try:
            request = parse(line)
            if "id" in request:
                echo = {"id": request["id"]}
            require_method(request)
            name, params = request["method"], convert(request)
            if isinstance(params, m.Logs):
                streaming = params.follow
                await self._serve_logs(params, reader, writer, caller, echo)
                return not streaming
            if name == "subscribe":
                streaming = True
                await self._stream_events(reader, writer, echo)
                return False
            if name == "status":
                result: Any = await self._engine.status()
            elif name == "snapshots":
                result = self._engine.snapshots(caller)
            else:
                result = await self._engine.submit(name, params, caller)
        except errors.GpuschedError as error:
            await self._send(writer, {**errors.to_wire(error), **echo})
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            log.exception("request failed line=%r", line[:200])
            internal = errors.InternalError(f"a defect in gpusched: {error!r}")
            await self._send(writer, {**errors.to_wire(internal), **echo})
        else:
            await self._send(writer, {"ok": True, "result": result, **echo})
        return not streaming

    async def _send(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        await self._write(writer, encode(message))

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await writer.drain()

    # -- streams ----------------------------------------------------------------------------------

    async def _serve_logs(
        self,
        params: m.Logs,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        caller: Caller,
        echo: dict[str, Any],
    ) -> None:
        process = self._engine.process_for(params.name, caller)
        if process.log_path is None:
            raise errors.NotFound(
                f"{process.name} was adopted: its output goes where it went before, not to a log of ours"
            )
        turns = self._log_turns.setdefault(caller.uid, asyncio.Semaphore(LOG_READERS_PER_UID))
        async with turns:
            lines, offset = await self._logs.tail(
                process.log_path, process.uid, params.lines, only_whole=params.follow
            )
            data = await asyncio.to_thread(_log_answer, process.name, lines, echo)
            del lines
            await self._write(writer, data)
            del data
        if not params.follow:
            return
        node, tree_id = self._engine.core.node, process.tree_id

        def is_over() -> bool:
            now = node.processes.get(tree_id)
            return now is None or now.exit is not None

        written = self._logs.follow(process.log_path, process.uid, offset, is_over)
        await self._stream(reader, writer, ({"line": line} async for line in written))

    async def _stream_events(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: dict[str, Any]
    ) -> None:
        """A status, then every event, until the client hangs up or falls too far behind."""
        events = self._engine.core.events
        queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=EVENT_QUEUE)
        events.listeners.add(queue)
        try:
            status = await self._engine.status()
            await self._send(writer, {"ok": True, "result": status, **echo})
            await self._stream(reader, writer, until_none(queue))
        finally:
            events.listeners.discard(queue)

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        items: AsyncIterator[dict[str, Any]],
    ) -> None:
        """Sends ``items`` until there are no more or the client hangs up, even if nothing is ever to be sent."""

        async def send_all() -> None:
            async for item in items:
                await self._send(writer, item)
                await asyncio.sleep(0)  # a log that grows fast must not keep others waiting

        sending = asyncio.ensure_future(send_all())
        hang_up = asyncio.ensure_future(until_closed(reader))
        try:
            await asyncio.wait((sending, hang_up), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # raises what ended it
        finally:
            sending.cancel()
            hang_up.cancel()
            await asyncio.gather(sending, hang_up, return_exceptions=True)


async def until_closed(reader: asyncio.StreamReader) -> None:
    """Reads and drops whatever the client still says, until it closes."""
    while await reader.read(65536):
        pass


async def until_none(queue: asyncio.Queue[Any]) -> AsyncIterator[dict[str, Any]]:
    while (item := await queue.get()) is not None:
        yield item


def encode(message: dict[str, Any]) -> bytes:
    """One message as one line, newline included; ten times as fast as the SDK's, for ``status`` is asked often."""
    try:
        return msgspec.json.encode(message) + b"\n"
    except (UnicodeEncodeError, OverflowError, TypeError):
        # Half a surrogate pair or a huge integer, which a client sent and wants back.
        return json.dumps(message, default=_plain).encode() + b"\n"


def _plain(value: object) -> Any:
    return json.loads(bytes(value)) if isinstance(value, msgspec.Raw) else str(value)


def _log_answer(name: str, lines: list[str], echo: dict[str, Any]) -> bytes:
    """For a thread, and so in pieces: one call for a large log would keep the interpreter from everybody else."""
    quoted = [_quoted(line) for line in lines]
    output = b"\\n".join(text[1:-1] for text in quoted)
    rest = encode(echo).strip()[1:-1]
    return b'{"ok":true,"result":{"name":%b,"lines":[%b],"output":"%b"}%b}\n' % (
        _quoted(name),
        b",".join(quoted),
        output,
        b"," + rest if rest else b"",
    )


def _quoted(text: str) -> bytes:
    """``text`` as JSON."""
    if len(text) <= _PIECE:
        return msgspec.json.encode(text)
    pieces = (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
    return b'"%b"' % b"".join(msgspec.json.encode(piece)[1:-1] for piece in pieces)


def parse(line: bytes) -> dict[str, Any]:
    """A request line as an object whose ``id``, if any, can be echoed. Raises InvalidRequest."""
    try:
        request = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"not JSON: {error}") from None
    if not isinstance(request, dict):
        raise errors.InvalidRequest("a request is a JSON object with a method")
    if not isinstance(request.get("id"), _Id):
        raise errors.InvalidRequest("id must be a string or a number")
    return request


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is out of range")
    return number


def require_method(request: dict[str, Any]) -> None:
    """Raises InvalidRequest for a method that is not there."""
    method = request.get("method")
    if not isinstance(method, str) or method not in METHODS:
        shown = json.dumps(method)[:80] if isinstance(method, _Id) else "that is no string"
        raise errors.InvalidRequest(
            f"unknown method {shown}; there are {', '.join(sorted(METHODS))}"
        )


def convert(request: dict[str, Any]) -> msgspec.Struct:
    """The typed parameters of a parsed request. Raises InvalidRequest naming the parameter."""
    params = request.get("params")
    try:
        return msgspec.convert({} if params is None else params, METHODS[request["method"]].params)
    except (msgspec.ValidationError, UnicodeEncodeError, RecursionError) as error:
        raise errors.InvalidRequest(f"{request['method']}: {error}") from None


def gid_of(group: str | None) -> int | None:
    """The configured group's number. Raises InvalidRequest when there is none of that name."""
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise errors.InvalidRequest(
            f"there is no group {group!r}; make it (groupadd {group}) or start without --group"
        ) from None


def peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """The supplementary groups that the peer had when it connected, as the kernel knows them. Raises OSError."""
    found = (ctypes.c_uint32 * _MAX_GROUPS)()
    size = ctypes.c_uint32(ctypes.sizeof(found))
    # socket.getsockopt() takes 1024 bytes at most: 256 groups.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, found, ctypes.byref(size)):
        raise OSError(ctypes.get_errno(), "getsockopt(SO_PEERGROUPS)")
    return tuple(found[: size.value // 4])
