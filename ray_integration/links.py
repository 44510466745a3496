"""The proxy's connections to its host: one for each thread that calls, or one for all calls of an event loop.

A connection is made when it is first needed, and again after ``drop``. The host's end of it decides on which thread a
method runs there: see ``host.py``. Raises HostLost for a host that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ray_integration import pickling
from ray_integration.buffers import BufferPool
from ray_integration.errors import HostError, HostLost
from ray_integration.frames import ConnectionLost, Frame, FrameSocket, Kind, check_peer

#: Seconds between two looks at whether a call was cancelled meanwhile.
_CANCEL_LOOK_S: Final = 0.1


class RemoteTraceback(Exception):
    """The frames that an exception came through in the host, for whoever prints it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def raise_error(frame: Frame) -> Any:
    """Raises the exception that an ERROR frame holds, with the host's frames as its cause."""
    pickled, summary, text = frame.load()
    error: BaseException
    try:
        error = pickling.loads(pickled, []) if pickled else HostError(summary)
    except Exception:  # noqa: BLE001 - whatever a user's class raises
        error = HostError(summary)
    raise error from RemoteTraceback(text)


class Links:
    """All connections of one proxy. Threads may share it."""

    def __init__(self, path: Path | Callable[[], Path]) -> None:
        """``path``: the host's socket, or a function that says where it is now."""
        self._find = path if callable(path) else lambda: path
        self._path = Path()
        self._pool = BufferPool()
        self._idents = itertools.count(1)
        self._lock = threading.Lock()
        self._lanes: dict[int, FrameSocket] = {}
        self._main_thread: int | None = None
        self._control: FrameSocket | None = None
        self._loop_lane: _LoopLane | None = None

    def connect(self, lane: str, timeout_s: float = 0.0) -> tuple[FrameSocket, dict[str, Any]]:
        """A new connection, and what the host says of itself. Waits up to ``timeout_s`` for a host that starts."""
        deadline = time.monotonic() + timeout_s
        self._path = self._find()
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                return self._greet(sock, lane)
            except (OSError, ConnectionLost) as error:
                sock.close()
                if time.monotonic() >= deadline:
                    raise HostLost(f"no host answers at {self._path}: {error}") from error
            time.sleep(0.01)

    def _greet(self, sock: socket.socket, lane: str) -> tuple[FrameSocket, dict[str, Any]]:
        sock.connect(str(self._path))
        check_peer(sock)
        link = FrameSocket(sock, self._pool)
        link.send(Kind.HELLO, 0, lane)
        frame = link.receive()
        assert frame is not None
        welcome: dict[str, Any] = frame.load()
        link.reach(welcome["shown"])
        return link, welcome

    def drop(self) -> None:
        """Closes every connection, and frees the buffers. No call may be under way."""
        with self._lock:
            links = [*self._lanes.values()]
            self._lanes.clear()
            if self._control is not None:
                links.append(self._control)
                self._control = None
            lane, self._loop_lane = self._loop_lane, None
        if lane is not None:
            lane.close()
        for link in links:
            link.close()
        self._pool.trim()

    def cancel(self, ident: int) -> None:
        """Tells the host that nobody waits for this call any more."""
        with contextlib.suppress(ConnectionLost, HostLost):
            with self._lock:
                if self._control is None:
                    self._control, _ = self.connect("control")
                control = self._control
            control.send(Kind.CANCEL, ident)

    # -- from a thread --------------------------------------------------------------------------

    def call(
        self, kind: Kind, value: object, *, on_main: bool, is_cancelled: Callable[[], bool]
    ) -> Any:
        """One call and its result. Blocks until the host answers, also if it is frozen meanwhile."""
        with self._lost_host():
            link = self._lane(on_main)
            ident = next(self._idents)
            link.send(kind, ident, value)
            frame = self._answer(link, ident, is_cancelled)
            if frame.kind is Kind.ERROR:
                raise_error(frame)
            return frame.load()

    def stream(
        self, value: object, *, on_main: bool, is_cancelled: Callable[[], bool]
    ) -> Iterator[Any]:
        """The items of a generator in the host, each computed when it is asked for."""
        with self._lost_host():
            link = self._lane(on_main)
            ident = next(self._idents)
            link.send(Kind.CALL, ident, value)
            frame = self._answer(link, ident, is_cancelled)
            while frame.kind is Kind.ITEM:
                try:
                    yield frame.load()
                except GeneratorExit:
                    link.send(Kind.CLOSE, ident)
                    self._answer(link, ident, is_cancelled)
                    raise
                link.send(Kind.NEXT, ident)
                frame = self._answer(link, ident, is_cancelled)
            if frame.kind is Kind.ERROR:
                raise_error(frame)

    def _answer(self, link: FrameSocket, ident: int, is_cancelled: Callable[[], bool]) -> Frame:
        told = False
        while (frame := link.receive(None if told else _CANCEL_LOOK_S)) is None:
            if is_cancelled():
                self.cancel(ident)
                told = True
        return frame

    def _lane(self, on_main: bool) -> FrameSocket:
        """This thread's connection. The first thread of the default concurrency group has the host's main thread."""
        thread = threading.get_ident()
        if (link := self._lanes.get(thread)) is not None:
            return link
        with self._lock:
            if on_main and self._main_thread is None:
                self._main_thread = thread
            lane = "main" if self._main_thread == thread else "thread"
        link, _ = self.connect(lane)
        with self._lock:
            self._lanes[thread] = link
        return link

    def call_apart(self, method: str, lane: str) -> Any:
        """One call without arguments on a connection that it alone has; no other may be there for lane ``main``."""
        with self._lost_host():
            link, _ = self.connect(lane)
            try:
                ident = next(self._idents)
                link.send(Kind.CALL, ident, (method, (), {}, False))
                frame = self._answer(link, ident, lambda: False)
            finally:
                link.close()
            if frame.kind is Kind.ERROR:
                raise_error(frame)
            return frame.load()

    def release_main(self) -> None:
        """The constructor's thread need not be the one that calls methods later."""
        with self._lock:
            link = self._lanes.pop(threading.get_ident(), None)
            self._main_thread = None
        if link is not None:
            link.close()

    @contextlib.contextmanager
    def _lost_host(self) -> Iterator[None]:
        try:
            yield
        except ConnectionLost as error:
            raise HostLost(f"the host at {self._path} has ended: {error}") from error

    # -- from an event loop ---------------------------------------------------------------------

    async def call_async(self, value: object) -> Any:
        lane, ident = self._async_lane(), next(self._idents)
        answers = lane.expect(ident)
        try:
            lane.send(Kind.CALL, ident, value)
            frame = await answers.get()
            if frame.kind is Kind.ERROR:
                raise_error(frame)
            return frame.load()
        except asyncio.CancelledError:
            lane.tell(Kind.CANCEL, ident)
            raise
        finally:
            lane.forget(ident)

    async def stream_async(self, value: object) -> AsyncIterator[Any]:
        lane, ident = self._async_lane(), next(self._idents)
        answers = lane.expect(ident)
        is_over = False
        try:
            lane.send(Kind.CALL, ident, value)
            while (frame := await answers.get()).kind is Kind.ITEM:
                yield frame.load()
                lane.send(Kind.NEXT, ident)
            is_over = True
            if frame.kind is Kind.ERROR:
                raise_error(frame)
        finally:
            if not is_over:
                lane.tell(Kind.CANCEL, ident)
            lane.forget(ident)

    def _async_lane(self) -> _LoopLane:
        with self._lock:
            if self._loop_lane is None:
                link, _ = self.connect("async")
                self._loop_lane = _LoopLane(link)
            return self._loop_lane


class _Answers:
    """Frames for one call, handed from the receiving thread to the call's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: asyncio.Queue[Frame | HostLost] = asyncio.Queue()

    def put(self, frame: Frame | HostLost) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._frames.put_nowait, frame)

    async def get(self) -> Frame:
        frame = await self._frames.get()
        if isinstance(frame, HostLost):
            raise frame
        return frame


class _LoopLane:
    """A connection that many calls share; a thread receives for all of them."""

    def __init__(self, link: FrameSocket) -> None:
        self._link = link
        self._calls: dict[int, _Answers] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._receive, name="gpusched-lane", daemon=True)
        self._thread.start()

    def expect(self, ident: int) -> _Answers:
        answers = self._calls[ident] = _Answers()
        return answers

    def forget(self, ident: int) -> None:
        self._calls.pop(ident, None)

    def send(self, kind: Kind, ident: int, value: object = None) -> None:
        try:
            self._link.send(kind, ident, value)
        except ConnectionLost as error:
            raise HostLost(f"the host has ended: {error}") from error

    def tell(self, kind: Kind, ident: int) -> None:
        with contextlib.suppress(HostLost):
            self.send(kind, ident)

    def close(self) -> None:
        self._is_closed = True
        self._link.close()

    def _receive(self) -> None:
        try:
            while (frame := self._link.receive()) is not None:
                if (answers := self._calls.get(frame.ident)) is not None:
                    answers.put(frame)
                del frame
        except ConnectionLost as error:
            if not self._is_closed:
                for answers in list(self._calls.values()):
                    answers.put(HostLost(f"the host has ended: {error}"))
