"""The Unix socket: JSON lines in, one answer line each, in order. Who asks is what the kernel says.

The daemon never dies of input: every line gets one answer, whatever is in it. A connection that sends a line of
1 MiB or more gets an error and is closed, because where the next line begins is unknown.
"""

from __future__ import annotations

import asyncio
import grp
import itertools
import json
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from gpusched import errors
from gpusched.engine.engine import Engine
from gpusched.engine.events import ConnectionClosed
from gpusched.engine.model import Caller, Process
from gpusched.protocol import messages as m
from gpusched.protocol.codec import LineBuffer, LineTooLong, encode
from gpusched.protocol.methods import METHODS

log = logging.getLogger(__name__)

#: Connections that one ordinary user may hold: enough for every lease, too few to use up our descriptors.
CONNECTIONS_PER_UID: Final = 256
#: A client that does not read its answers for this long is cut off.
WRITE_TIMEOUT_S: Final = 60.0
EVENT_QUEUE: Final = 1000

Follower = Callable[[Process, int], AsyncIterator[str]]


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
        self._logs = logs
        self._ids = itertools.count(1)
        self._per_uid: Counter[int] = Counter()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens. A path that another live daemon serves is refused; a left-over socket is replaced."""
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
        self._connections.add(task)
        caller = self._caller(writer)
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
            pass  # the client is gone, or does not read
        except asyncio.CancelledError:
            pass  # the daemon is closing
        finally:
            self._per_uid[caller.uid] -= 1
            if not self._per_uid[caller.uid]:
                del self._per_uid[caller.uid]
            self._engine.core.post(ConnectionClosed(connection=caller.connection))
            self._connections.discard(task)
            writer.close()

    def _caller(self, writer: asyncio.StreamWriter) -> Caller:
        sock: socket.socket = writer.get_extra_info("socket")
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("3i", raw)
        privileged = uid in (0, os.geteuid()) or self._in_group(sock, gid)
        return Caller(uid=uid, gid=gid, pid=pid, connection=next(self._ids), privileged=privileged)

    def _in_group(self, sock: socket.socket, gid: int) -> bool:
        """Whether the peer's own groups, as the kernel knows them, include the configured one."""
        if self._group is None:
            return False
        try:
            wanted = grp.getgrnam(self._group).gr_gid
        except KeyError:
            return False
        peer_groups = 59  # SO_PEERGROUPS, which the socket module does not name
        raw = sock.getsockopt(socket.SOL_SOCKET, peer_groups, 4 * 65536)
        groups = struct.unpack(f"{len(raw) // 4}i", raw)
        return wanted == gid or wanted in groups

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
        try:
            request = parse(line)
            if "id" in request:
                echo = {"id": request["id"]}
            name, params = request["method"], convert(request)
            if isinstance(params, m.Logs):
                return await self._serve_logs(params, writer, caller, echo)
            if name == "subscribe":
                await self._stream_events(reader, writer, echo)
                return False
            if name == "status":
                result: Any = await self._engine.status()
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
        return True

    async def _send(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        writer.write(encode(message))
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await writer.drain()

    # -- streams ----------------------------------------------------------------------------------

    async def _serve_logs(
        self,
        params: m.Logs,
        writer: asyncio.StreamWriter,
        caller: Caller,
        echo: dict[str, Any],
    ) -> bool:
        process = self._engine.process_for(params.name, caller)
        if process.log_path is None:
            raise errors.NotFound(
                f"{process.name} was adopted: its output goes where it went before, not to a log of ours"
            )
        lines, offset = await self._logs.tail(process.log_path, process.uid, params.lines)
        result = {"name": process.name, "lines": lines, "output": "\n".join(lines)}
        await self._send(writer, {"ok": True, "result": result, **echo})
        if not params.follow:
            return True
        node, tree_id = self._engine.core.node, process.tree_id

        def is_over() -> bool:
            now = node.processes.get(tree_id)
            return now is None or now.exit is not None

        async for line in self._logs.follow(process.log_path, process.uid, offset, is_over):
            await self._send(writer, {"line": line})
        return False

    async def _stream_events(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: dict[str, Any]
    ) -> None:
        """A status, then every event, until the client hangs up or falls too far behind."""
        events = self._engine.core.events
        queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=EVENT_QUEUE)
        events.listeners.add(queue)
        hang_up = asyncio.ensure_future(until_closed(reader))
        following: asyncio.Future[Any] | None = None
        try:
            status = await self._engine.status()
            await self._send(writer, {"ok": True, "result": status, **echo})
            while not hang_up.done():
                following = asyncio.ensure_future(queue.get())
                await asyncio.wait((hang_up, following), return_when=asyncio.FIRST_COMPLETED)
                if not following.done() or (event := following.result()) is None:
                    return
                await self._send(writer, event)
        finally:
            events.listeners.discard(queue)
            hang_up.cancel()
            if following is not None:
                following.cancel()


async def until_closed(reader: asyncio.StreamReader) -> None:
    """Reads and drops whatever the client still says, until it closes."""
    while await reader.read(65536):
        pass


def parse(line: bytes) -> dict[str, Any]:
    """A request line as an object with a known method. Raises InvalidRequest."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"not JSON: {error}") from None
    if not isinstance(request, dict):
        raise errors.InvalidRequest("a request is a JSON object with a method")
    method = request.get("method")
    if not isinstance(method, str) or method not in METHODS:
        shown = json.dumps(method)[:80]
        raise errors.InvalidRequest(
            f"unknown method {shown}; there are {', '.join(sorted(METHODS))}"
        )
    return request


def convert(request: dict[str, Any]) -> msgspec.Struct:
    """The typed parameters of a parsed request. Raises InvalidRequest naming the parameter."""
    params = request.get("params")
    try:
        return msgspec.convert({} if params is None else params, METHODS[request["method"]].params)
    except (msgspec.ValidationError, RecursionError) as error:
        raise errors.InvalidRequest(f"{request['method']}: {error}") from None


def bind(path: Path) -> socket.socket:
    """A bound socket that every user may connect to (who they are decides what they may do).

    Raises Unavailable when a live daemon serves the path. In a world-writable directory any user may have put
    something there; what does not answer as root or as us is removed.
    """
    if len(os.fsencode(path)) > 107:
        raise errors.InvalidRequest(f"the socket path is longer than 107 bytes: {path}")
    if owner_answers(path):
        raise errors.Unavailable(
            f"a daemon serves {path} already; stop it, or choose another with --socket"
        )
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o111)
    try:
        server.bind(str(path))
    except OSError as error:
        server.close()
        raise errors.Unavailable(f"cannot listen at {path}: {error.strerror}") from error
    finally:
        os.umask(old)
    return server


def owner_answers(path: Path) -> bool:
    """Whether root or we listen at ``path`` now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return False
        uid: int = struct.unpack("3i", raw)[1]
        return uid in (0, os.geteuid())
