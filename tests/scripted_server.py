"""A Unix-socket server that answers as a test tells it: real sockets, one thread for each connection.

Covers: reading requests, answering whole, in pieces, wrongly or not at all; a server of another user; and the scripts
that the SDK's tests share.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
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

    def __init__(self, directory: Path, script: Callable[[Peer], object]) -> None:
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


STATUS: dict[str, Any] = {
    "gpus": [
        {
            "index": 0,
            "name": "GPU",
            "mem_total_mb": 80000,
            "mem_used_mb": 500,
            "mem_free_mb": 79500,
        },
        {"index": 1, "name": "GPU", "mem_total_mb": 80000, "mem_used_mb": 80000, "mem_free_mb": 0},
    ],
    "processes": [{"name": "a", "state": "active", "mem_mb": 1200, "pid": 7}],
}


def status_of(**process: Any) -> dict[str, Any]:
    return {**STATUS, "processes": [{"name": "a", "pid": 7, **process}] if process else []}


def statuses(*answers: dict[str, Any]) -> Callable[[Peer], None]:
    """Answers each status with the next of ``answers``, the last one for ever."""
    left = list(answers)

    def script(peer: Peer) -> None:
        for _ in peer.requests():
            peer.answer(left.pop(0) if len(left) > 1 else left[0])

    return script


class LeaseBook:
    """A script that keeps leases as a daemon does: for each connection, until it ends."""

    def __init__(self) -> None:
        self.held: dict[int, list[str]] = {}

    def __call__(self, peer: Peer) -> None:
        for request in peer.requests():
            name = request["params"].get("name")
            if request["method"] == "release":
                peer.answer({"name": name, "released": 0})
            elif name == "gone":
                peer.refuse("no such process", code="not_found")
            else:
                self.held.setdefault(peer.number, []).append(name)
                peer.answer({"name": name, "from_tier": "ram"})
        self.held.pop(peer.number, None)


_SERVE_AS = """
import os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
os.umask(0)
os.setuid(uid)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("listening", flush=True)
listener.settimeout(30)
peer, _ = listener.accept()
peer.settimeout(30)
data = peer.recv(4096)
if data:
    peer.sendall(b'{"ok":true,"result":{"gpus":[]},"id":1}\\n')
print(data.decode(), flush=True)
"""


class ForeignServer:
    """Another process, of user ``uid``, that listens and answers one request with an empty status."""

    def __init__(self, uid: int) -> None:
        self._uid = uid
        self._directory = tempfile.TemporaryDirectory(
            dir="/tmp"
        )  # pytest's own is closed to others
        self.path = f"{self._directory.name}/s"

    def received(self) -> str:
        """All that came in; waits for the connection and its first bytes, or its end."""
        assert self._process.stdout is not None
        return self._process.stdout.read().strip()

    def __enter__(self) -> Self:
        Path(self._directory.name).chmod(0o777)
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _SERVE_AS, self.path, str(self._uid)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate(timeout=JOIN_S)
        self._directory.cleanup()


def run_python(code: str, *arguments: str, flags: tuple[str, ...] = ()) -> str:
    """What a fresh interpreter prints, with this package in its path."""
    ended = subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
