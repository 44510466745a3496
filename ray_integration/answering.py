"""The proxy's own socket: where the node's agent says that the model is about to be frozen, and what became of that.

JSON lines, one answer each. A connection that asked to ``prepare`` holds the model's calls back until it says
``settled``, or ends: nobody's crash leaves a gate closed.

    {"do": "prepare", "drain": true, "timeout_s": 60}    calls wait; those under way have ended
    {"do": "quiesce"}                                    no connection is left, and before_freeze has run
    {"do": "settled", "on_gpu": false}                   where the model is now
    {"do": "status"}                                     who calls and who waits

``quiesce`` comes when all models that go together are prepared: their hooks may wait for one another.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from gpusched import errors
from ray_integration.frames import ConnectionLost, check_peer

if TYPE_CHECKING:
    from ray_integration.proxy import Proxy

#: The name of the proxy's socket in the model's directory.
SOCKET: Final = "proxy"


class Conversation(Protocol):
    """What is behind one connection of an agent."""

    def prepare(self, request: dict[str, Any]) -> None: ...

    def quiesce(self) -> None: ...

    def settled(self, *, on_gpu: bool) -> None: ...

    def status(self) -> dict[str, Any]: ...

    def end(self) -> None:
        """The connection is over: what it holds back goes on."""
        ...


def listen(path: Path) -> socket.socket:
    """A socket that this user alone can connect to."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    listener.listen()
    return listener


def serve(path: Path, begin: Callable[[], Conversation]) -> socket.socket:
    """Listens, and answers on threads, until the socket that it returns is shut down."""
    listener = listen(path)
    threading.Thread(
        target=_accept, args=(listener, begin), name="gpusched-answering", daemon=True
    ).start()
    return listener


def _accept(listener: socket.socket, begin: Callable[[], Conversation]) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with contextlib.suppress(ConnectionLost):
            check_peer(sock)
            threading.Thread(target=_talk, args=(sock, begin()), daemon=True).start()


def _talk(sock: socket.socket, conversation: Conversation) -> None:
    try:
        with sock, sock.makefile("rb") as lines:
            for line in lines:
                answer = _answer(conversation, json.loads(line))
                sock.sendall(json.dumps(answer).encode() + b"\n")
    except (OSError, ValueError):
        pass  # the agent is gone, which ends its hold
    finally:
        with contextlib.suppress(errors.GpuschedError):  # the host's log has it
            conversation.end()


def _answer(conversation: Conversation, request: dict[str, Any]) -> dict[str, Any]:
    try:
        match request["do"]:
            case "prepare":
                conversation.prepare(request)
            case "quiesce":
                conversation.quiesce()
            case "settled":
                conversation.settled(on_gpu=request["on_gpu"])
            case "status":
                return {"ok": True, **conversation.status()}
            case other:
                raise errors.InvalidRequest(f"a proxy cannot {other!r}")
    except errors.GpuschedError as error:
        return errors.to_wire(error)
    return {"ok": True}


class ProxyConversation:
    """With the proxy of a hosted model."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._holds = False

    def status(self) -> dict[str, Any]:
        gate = self._proxy.gate
        return {
            "gate": gate.state,
            "under_way": gate.under_way,
            "waiting": gate.waiting,
            "idle_s": gate.idle_s,
            "proxy_pid": os.getpid(),
        }

    def prepare(self, request: dict[str, Any]) -> None:
        """Holds calls back; a drain that takes too long lets them go again."""
        if not self._holds:
            self._holds = True
            self._proxy.hold()
        if request["drain"]:
            try:
                self._proxy.gate.drain(request["timeout_s"])
            except errors.DeadlineExceeded:
                self._release(on_gpu=None)
                raise

    def quiesce(self) -> None:
        """A hook that fails lets the calls go again."""
        self._proxy.links.drop()
        try:
            self._proxy.hooks.before_freeze()
        except errors.GpuschedError:
            self._release(on_gpu=None)
            raise

    def settled(self, *, on_gpu: bool) -> None:
        if self._holds:
            self._release(on_gpu=on_gpu)
        else:
            self._proxy.learn(on_gpu=on_gpu)

    def end(self) -> None:
        self._release(on_gpu=None)

    def _release(self, *, on_gpu: bool | None) -> None:
        if self._holds:
            self._holds = False
            self._proxy.unhold(on_gpu=on_gpu)
