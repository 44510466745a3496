"""The proxy's own socket: where the node's agent says that the model is about to be frozen, and what became of that.

JSON lines, one answer each. A connection that asked to ``prepare`` holds the model's calls back until it says
``settled``, or ends: nobody's crash leaves a gate closed.

    {"do": "prepare", "drain": true, "timeout_s": 60, "disconnect": true}    calls wait; those under way have ended
    {"do": "settled", "on_gpu": false}                                       where the model is now
    {"do": "status"}                                                         who calls and who waits
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

from gpusched import errors
from ray_integration.frames import ConnectionLost, check_peer

if TYPE_CHECKING:
    from ray_integration.proxy import Proxy

#: The name of the proxy's socket in the model's directory.
SOCKET: Final = "proxy"


def serve(proxy: Proxy) -> None:
    """Listens, and answers on threads."""
    path = proxy.about.directory / SOCKET
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    listener.listen()
    threading.Thread(
        target=_accept, args=(proxy, listener), name="gpusched-answering", daemon=True
    ).start()


def _accept(proxy: Proxy, listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        with contextlib.suppress(ConnectionLost):
            check_peer(sock)
            threading.Thread(target=_Conversation(proxy, sock).run, daemon=True).start()


class _Conversation:
    """One connection of an agent."""

    def __init__(self, proxy: Proxy, sock: socket.socket) -> None:
        self._proxy = proxy
        self._sock = sock
        self._holds = False

    def run(self) -> None:
        try:
            with self._sock, self._sock.makefile("rb") as lines:
                for line in lines:
                    self._sock.sendall(json.dumps(self._answer(json.loads(line))).encode() + b"\n")
        except (OSError, ValueError):
            pass  # the agent is gone, which ends its hold
        finally:
            with contextlib.suppress(errors.GpuschedError):  # the host's log has it
                self._release(on_gpu=None)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            match request["do"]:
                case "prepare":
                    self._prepare(request)
                case "settled":
                    self._settled(on_gpu=request["on_gpu"])
                case "status":
                    gate = self._proxy.gate
                    return {
                        "ok": True,
                        "gate": gate.state,
                        "under_way": gate.under_way,
                        "waiting": gate.waiting,
                        "idle_s": gate.idle_s,
                        "proxy_pid": os.getpid(),
                    }
                case other:
                    raise errors.InvalidRequest(f"a proxy cannot {other!r}")
        except errors.GpuschedError as error:
            return errors.to_wire(error)
        return {"ok": True}

    def _prepare(self, request: dict[str, Any]) -> None:
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
            if request["disconnect"]:
                self._proxy.links.drop()
                try:
                    self._proxy.hooks.before_freeze()
                except errors.GpuschedError:
                    self._release(on_gpu=None)
                    raise

    def _settled(self, *, on_gpu: bool) -> None:
        if self._holds:
            self._release(on_gpu=on_gpu)
        else:
            self._proxy.learn(on_gpu=on_gpu)

    def _release(self, *, on_gpu: bool | None) -> None:
        if self._holds:
            self._holds = False
            self._proxy.unhold(on_gpu=on_gpu)
