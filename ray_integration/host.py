"""The host process of one model: makes the user's object, and calls its methods for the proxy.

Started by the daemon (``run``), so that it can be frozen, saved and copied. It listens at a Unix socket of its user's
(``places.own_socket``); the proxy connects. Which thread calls what (a lane is one connection):

    main     the main thread, as a plain actor's methods have it; the constructor too
    thread   a thread for each lane: an actor with max_concurrency or concurrency groups
    async    the event loop, which the main thread runs: a class with async methods
    control  word that a result is not wanted any more

Does not cover: the lanes themselves (``lanes.py``), the other end (``links.py``). Knows neither Ray nor the daemon, and
imports Ray only if the user's class, or what cloudpickle made of it, does.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Final

from ray_integration import direct, lanes, pickling, places
from ray_integration.buffers import BufferPool
from ray_integration.frames import ConnectionLost, Frame, FrameSocket, Kind, check_peer
from ray_integration.lanes import Model

_BACKLOG: Final = 128


def main(argument: str) -> None:
    """Serves for ever; ends by a signal, or with the model's process. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a ctrl-C in a terminal is not for us
    for stream in (sys.stdout, sys.stderr):  # a log file, which somebody may follow
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    Host(Path(argument)).run()


class Host:
    """Accepts lanes on a thread; serves those of the main thread on that."""

    def __init__(self, directory: Path) -> None:
        self._pool = BufferPool()
        self._token = direct.Token()
        self._model: Model | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main_lanes: queue.SimpleQueue[FrameSocket] = queue.SimpleQueue()
        self._open: set[FrameSocket] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = places.own_socket(directory)
        path.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(previous)
        self._listener.listen(_BACKLOG)

    def run(self) -> None:
        threading.Thread(target=self._accept, name="gpusched-accept", daemon=True).start()
        while True:
            link = self._main_lanes.get()
            self._until_lost(link, self._serve_main)
            if self._loop is not None:
                self._loop.run_forever()

    # -- lanes ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with contextlib.suppress(ConnectionLost):
                check_peer(sock)
                threading.Thread(
                    target=self._welcome, args=(FrameSocket(sock, self._pool),), daemon=True
                ).start()

    def _welcome(self, link: FrameSocket) -> None:
        """The first frame says which lane it is; every lane but ``main`` is served on this thread."""
        lane = ""
        try:
            hello = link.receive()
            assert hello is not None
            assert hello.kind is Kind.HELLO
            lane = hello.load()
            ready = self._model is not None
            link.send(Kind.WELCOME, 0, {"ready": ready, "shown": self._token.shown()})
        except ConnectionLost:
            link.close()
            return
        self._open.add(link)
        if lane == "main":
            self._main_lanes.put(link)
            return
        threading.current_thread().name = f"gpusched-{lane}"
        serve = {"thread": self._serve_thread, "async": self._serve_async}
        self._until_lost(link, serve.get(lane, self._serve_control))

    def _until_lost(self, link: FrameSocket, serve: Any) -> None:
        with contextlib.suppress(ConnectionLost):
            serve(link)
        link.close()
        self._open.discard(link)
        if (
            not self._open
        ):  # the proxy has let go: perhaps for an image, which large buffers would swell
            self._pool.trim()

    def _serve_main(self, link: FrameSocket) -> None:
        while (frame := link.receive()) is not None:
            if frame.kind is Kind.INIT:
                self._construct(link, frame)
                if self._loop is not None:
                    return
            elif self._model is not None:
                lanes.serve_call(self._model, link, frame)
            del frame  # its buffers go back now, not with the next call

    def _serve_thread(self, link: FrameSocket) -> None:
        while (frame := link.receive()) is not None:
            if self._model is not None:
                lanes.serve_call(self._model, link, frame)
            del frame

    def _serve_async(self, link: FrameSocket) -> None:
        assert self._model is not None
        assert self._loop is not None, "not a class with async methods"
        lanes.AsyncLane(self._model, link, self._loop).serve()

    def _serve_control(self, link: FrameSocket) -> None:
        while (frame := link.receive()) is not None:
            if frame.kind is Kind.CANCEL and self._model is not None:
                self._model.cancel(frame.ident)

    # -- the constructor ------------------------------------------------------------------------

    def _construct(self, link: FrameSocket, frame: Frame) -> None:
        """Makes the object on this, the main thread; for a class with async methods within its event loop."""
        try:
            pickled, args, kwargs = frame.load()
            cls = pickling.loads(pickled, [])
            if has_async_methods(cls):
                self._loop = asyncio.new_event_loop()
                asyncio.set_event_loop(self._loop)
                self._model = Model(self._loop.run_until_complete(_make(cls, args, kwargs)))
            else:
                self._model = Model(cls(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - all of it is the caller's to see
            self._loop = None
            lanes.send_error(link, frame.ident, error)
        else:
            link.send(Kind.RESULT, frame.ident)


async def _make(cls: type, args: Any, kwargs: Any) -> Any:
    return cls(*args, **kwargs)


def has_async_methods(cls: type) -> bool:
    """What Ray goes by: one async method, and all are called from an event loop."""
    return any(
        inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        for _, member in inspect.getmembers(cls, inspect.isfunction)
    )
