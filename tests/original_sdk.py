"""A client as its first users have it: the original calls over a plain socket, and nothing of this package.

Written from the wire alone, so that tests against a daemon prove that existing programs go on working. It must stay as
it is: whatever it needs, the daemon has to give.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any


class GpuSched:
    """One connection for each request, no ids, no codes: errors are told by their text."""

    def __init__(self, socket_path: str = "/tmp/gpusched.sock") -> None:
        self.socket_path = socket_path

    def _call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        request: dict[str, Any] = {"method": method}
        if params is not None:
            request["params"] = params
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(self.socket_path)
            except OSError as error:
                raise ConnectionError(
                    "gpusched daemon is not running. Start it with: sudo gpusched daemon"
                ) from error
            connection.sendall(json.dumps(request).encode() + b"\n")
            received = b""
            while not received.endswith(b"\n"):
                data = connection.recv(65536)
                if not data:
                    raise ConnectionError("the daemon closed the connection")
                received += data
        response = json.loads(received)
        if not response["ok"]:
            raise RuntimeError(response["error"])
        return response["result"]

    def run(self, name: str, cmd: Sequence[str], gpu: int = 0) -> dict[str, Any]:
        return dict(self._call("run", {"name": name, "cmd": list(cmd), "gpu": gpu}))

    def freeze(self, name: str) -> dict[str, Any]:
        return dict(self._call("freeze", {"name": name}))

    def thaw(self, name: str) -> dict[str, Any]:
        return dict(self._call("thaw", {"name": name}))

    def kill(self, name: str) -> dict[str, Any]:
        return dict(self._call("kill", {"name": name}))

    def hibernate(self, name: str) -> dict[str, Any]:
        return dict(self._call("hibernate", {"name": name}))

    def status(self) -> dict[str, Any]:
        return dict(self._call("status"))

    def logs(self, name: str, lines: int = 50) -> dict[str, Any]:
        return dict(self._call("logs", {"name": name, "lines": lines}))

    def swap(self, off: str, on: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.freeze(off), self.thaw(on)

    def processes(self) -> list[dict[str, Any]]:
        return list(self.status()["processes"])

    def gpu_free_mb(self, gpu: int = 0) -> int:
        for found in self.status()["gpus"]:
            if found["index"] == gpu:
                return int(found["mem_free_mb"])
        raise RuntimeError(f"no GPU {gpu}")

    def wait_ready(self, name: str, timeout: float = 120.0, poll: float = 2.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            for process in self.processes():
                if process["name"] == name and process["mem_mb"] > 0:
                    return dict(process)
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{name} was not ready within {timeout} s")
            time.sleep(poll)
