"""How a host calls the methods of its model: one after the other on a thread, or many at a time on an event loop.

A method's result goes back in one frame, or, where it is a generator, an item at a time as the proxy asks for them, so
that nothing is computed before it is wanted. Exceptions go back whole where they can be pickled, always with the text
of the frames that they came through.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import traceback
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, Final

from ray_integration import pickling
from ray_integration.frames import ConnectionLost, Frame, FrameSocket, Kind

#: Results of at most so many bytes are sent by the event loop itself.
_SMALL_BYTES: Final = 256 * 1024

_current = threading.local()


def is_cancelled() -> bool:
    """Whether ``ray.cancel`` was called on the call that runs on this thread of a host.

    What ``ray.get_runtime_context().is_canceled()`` says in a plain actor. False outside of a call.
    """
    call = getattr(_current, "call", None)
    return call is not None and call[1] in call[0].cancelled


class Model:
    """The user's object, and which of its calls were cancelled."""

    def __init__(self, instance: Any) -> None:
        self.instance = instance
        self.cancelled: set[int] = set()
        self.running: set[int] = set()

    def cancel(self, ident: int) -> None:
        if ident in self.running:
            self.cancelled.add(ident)

    def invoke(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == "__ray_call__":
            function, *rest = args
            return function(self.instance, *rest, **kwargs)
        return getattr(self.instance, method)(*args, **kwargs)


def send_error(link: FrameSocket, ident: int, error: BaseException) -> None:
    """The exception, or what can be said of one that cannot be pickled."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == __package__:
        trace = trace.tb_next  # our own frames say nothing to the user
    text = "".join(traceback.format_exception(type(error), error, trace))
    try:
        pickled, buffers = pickling.dumps(error)
        if buffers:
            pickled = b""
        else:
            pickling.loads(pickled, [])  # some pickle and do not come back
    except Exception:  # noqa: BLE001 - whatever a user's class raises
        pickled = b""
    link.send(Kind.ERROR, ident, (pickled, f"{type(error).__name__}: {error}", text))


# -- on a thread ----------------------------------------------------------------------------------


def serve_call(model: Model, link: FrameSocket, frame: Frame) -> None:
    """One call, to its end. Raises ConnectionLost; nothing else, whatever the method does."""
    if frame.kind is not Kind.CALL:
        return  # NEXT or CLOSE of a stream that has ended meanwhile
    ident = frame.ident
    model.running.add(ident)
    _current.call = (model, ident)
    try:
        method, args, kwargs, is_stream = frame.load()
        del frame
        result = model.invoke(method, args, kwargs)
        del args, kwargs
        if is_stream:
            _serve_stream(link, ident, result)
        else:
            link.send(Kind.RESULT, ident, result)
    except ConnectionLost:
        raise
    except BaseException as error:  # noqa: BLE001 - SystemExit too: it ends the actor, not the host
        send_error(link, ident, error)
    finally:
        _current.call = None
        model.running.discard(ident)
        model.cancelled.discard(ident)


def _serve_stream(link: FrameSocket, ident: int, items: Generator[Any, None, Any]) -> None:
    try:
        for item in items:
            link.send(Kind.ITEM, ident, item)
            answer = link.receive()
            if answer is None or answer.kind is not Kind.NEXT:
                break
    finally:
        items.close()
    link.send(Kind.END, ident)


# -- on the event loop ----------------------------------------------------------------------------


class AsyncLane:
    """One connection that many calls share. This thread receives, the loop runs the calls and sends small answers."""

    def __init__(self, model: Model, link: FrameSocket, loop: asyncio.AbstractEventLoop) -> None:
        self._model = model
        self._link = link
        self._loop = loop
        self._calls: dict[int, Future[None]] = {}
        self._wanted: dict[int, asyncio.Queue[Kind]] = {}

    def serve(self) -> None:
        """Until the connection is lost; calls under way then run to their ends."""
        while (frame := self._link.receive()) is not None:
            ident = frame.ident
            match frame.kind:
                case Kind.CALL:
                    self._start(ident, self._run(frame))
                case Kind.CANCEL:
                    if (call := self._calls.get(ident)) is not None:
                        call.cancel()
                case Kind.NEXT | Kind.CLOSE:
                    self._loop.call_soon_threadsafe(self._ask, ident, frame.kind)
                case _:
                    pass
            del frame

    def _start(self, ident: int, call: Coroutine[Any, Any, None]) -> None:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        self._calls[ident] = future
        future.add_done_callback(lambda _: self._calls.pop(ident, None))

    def _ask(self, ident: int, kind: Kind) -> None:
        if (wanted := self._wanted.get(ident)) is not None:
            wanted.put_nowait(kind)

    async def _run(self, frame: Frame) -> None:
        ident = frame.ident
        try:
            method, args, kwargs, is_stream = frame.load()
            del frame
            result = self._model.invoke(method, args, kwargs)
            if is_stream:
                await self._stream(ident, result)
                return
            if inspect.isawaitable(result):
                result = await result
            await self._send(Kind.RESULT, ident, result)
        except ConnectionLost:
            pass
        except asyncio.CancelledError as error:
            self._send_error(ident, error)
            raise
        except BaseException as error:  # noqa: BLE001 - all of it is the caller's to see
            self._send_error(ident, error)

    def _send_error(self, ident: int, error: BaseException) -> None:
        with contextlib.suppress(ConnectionLost):
            send_error(self._link, ident, error)

    async def _stream(self, ident: int, items: Any) -> None:
        wanted = self._wanted[ident] = asyncio.Queue()
        generator = items if inspect.isasyncgen(items) else _as_async(items)
        try:
            async for item in generator:
                await self._send(Kind.ITEM, ident, item)
                if await wanted.get() is not Kind.NEXT:
                    break
        finally:
            del self._wanted[ident]
            await generator.aclose()
        await self._send(Kind.END, ident, None)

    async def _send(self, kind: Kind, ident: int, value: object) -> None:
        """Pickled here, where nothing changes the value meanwhile; a large one is sent by another thread."""
        pieces = self._link.encode(kind, ident, value)
        if sum(piece.nbytes for piece in pieces) <= _SMALL_BYTES:
            self._link.send_encoded(pieces)
        else:
            await self._loop.run_in_executor(None, self._link.send_encoded, pieces)


async def _as_async(items: Generator[Any, None, Any]) -> AsyncGenerator[Any, None]:
    try:
        for item in items:
            yield item
    finally:
        items.close()
