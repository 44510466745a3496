"""A Unix-socket server that answers as a test tells it: real sockets, one thread for each connection.

Covers: reading requests, answering whole, in pieces, wrongly or not at all. It knows nothing of what the answers mean.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

JOIN_S = 10.0


class Peer:
    """One client's connection, seen from the server."""

    def __init__(self, server: ScriptedServer, number: int, sock: socket.socket) -> None:
        self.number = number
        self.sock = sock
        self._server = server
        self._file = sock.makefile("rb")
        self._request: dict[str, Any] = {}

    def request(self) -> dict[str, Any] | None:
        """The next request; None when the client has ended its side."""
        try:
            line = self._file.readline()
        except ConnectionResetError:
            return None
        if not line:
            return None
        self._request = json.loads(line)
        self._server.requests.append((self.number, self._request))
        return self._request

    def requests(self) -> Iterator[dict[str, Any]]:
        while (request := self.request()) is not None:
            yield request

    def answer(self, result: Any) -> None:
        self.send({"ok": True, "result": result, "id": self._request["id"]})

    def refuse(self, error: str, **more: Any) -> None:
        self.send({"ok": False, "error": error, "id": self._request["id"], **more})

    def send(self, message: Any) -> None:
        self.send_bytes(json.dumps(message).encode() + b"\n")

    def send_bytes(self, data: bytes) -> None:
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # the client left: its right
            self.sock.sendall(data)

    def close(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class ScriptedServer:
    """Runs ``script(peer)`` for each connection until the block ends; a script that raises fails the test.

    Attributes:
        requests: (number of the connection, request), in the order they came.
    """

    def __init__(self, directory: Path, script: Callable[[Peer], None]) -> None:
        self.path = str(directory / "s")
        self.requests: list[tuple[int, dict[str, Any]]] = []
        self._script = script
        self._peers: list[Peer] = []
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX)

    @property
    def methods(self) -> list[str]:
        return [request["method"] for _, request in self.requests]

    @property
    def connections(self) -> int:
        return len(self._peers)

    def __enter__(self) -> Self:
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._accepting.join(JOIN_S)
        self._listener.close()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(JOIN_S)
            assert not thread.is_alive(), "a script did not end with its connection"
        if self._errors and error is None:
            raise self._errors[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            peer = Peer(self, len(self._peers), sock)
            self._peers.append(peer)
            thread = threading.Thread(target=self._serve, args=(peer,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: Peer) -> None:
        try:
            self._script(peer)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            self._errors.append(error)
        finally:
            peer.close()


def answer_all(results: dict[str, Any]) -> Callable[[Peer], None]:
    """A script that answers each method with its entry in ``results``."""

    def script(peer: Peer) -> None:
        for request in peer.requests():
            peer.answer(results[request["method"]])

    return script
