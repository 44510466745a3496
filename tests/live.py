"""What tests against a running daemon share: raw connections, other users, workloads and their digests.

Covers: talking to the daemon without the SDK, acting as another uid for real, and what a workload says of its VRAM.
Does not cover: the daemon's own life (``daemons.py``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from daemons import ROOT, PrivateDaemon, request, wait_until
from gpusched.mechanisms.sim.driver import SimDriver
from gpusched.ports import DriverState

#: Two users that own nothing here, and a group that neither is in.
ALICE = 65534
MALLORY = 65533
STAFF = 65532
#: How long a workload may take to start on a busy machine.
START_S = 30.0
SLEEP = ["sleep", "1000"]


class Line:
    """One raw connection: lines out, lines in, nothing checked."""

    def __init__(self, path: str, timeout_s: float = 60.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        self.socket.connect(path)
        self._file = self.socket.makefile("rb")

    def send(self, *messages: Any) -> None:
        self.send_bytes(b"".join(json.dumps(m).encode() + b"\n" for m in messages))

    def send_bytes(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict[str, Any]:
        """The next line. EOFError when there is none any more."""
        try:
            line = self._file.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise EOFError("the daemon closed the connection")
        answer: dict[str, Any] = json.loads(line, parse_constant=_refuse)
        return answer

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.send({"method": method, "params": params})
        return self.read()

    def result(self, method: str, **params: Any) -> Any:
        answer = self.ask(method, **params)
        assert answer["ok"], answer
        return answer["result"]

    def code(self, method: str, **params: Any) -> str:
        """The error code of a request that must fail."""
        answer = self.ask(method, **params)
        assert not answer["ok"], answer
        assert isinstance(answer["error"], str) and answer["error"], answer
        return str(answer["code"])

    def is_closed(self) -> bool:
        with contextlib.suppress(EOFError):
            raise AssertionError(f"one line too many: {self.read()}")
        return True

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


@contextlib.contextmanager
def running(
    *, gpus: int = 1, vram: str = "256M", args: Sequence[str] = ()
) -> Iterator[PrivateDaemon]:
    """A daemon for a whole test module; ended, and proved gone, afterwards."""
    daemon = PrivateDaemon(gpus=gpus, vram=vram, args=args)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.end()


def ask(daemon: PrivateDaemon, method: str, **params: Any) -> Any:
    """One request as root; its result."""
    answer = request(daemon.socket, method, **params)
    assert answer["ok"], answer
    return answer["result"]


def error_of(daemon: PrivateDaemon, method: str, **params: Any) -> dict[str, Any]:
    answer = request(daemon.socket, method, **params)
    assert not answer["ok"], answer
    return answer


def find(daemon: PrivateDaemon, name: str) -> dict[str, Any] | None:
    listed = ask(daemon, "status")["processes"]
    return next((p for p in listed if p["name"] == name), None)


def process(daemon: PrivateDaemon, name: str) -> dict[str, Any]:
    found = find(daemon, name)
    assert found is not None, f"{name} is not there"
    return found


def state(daemon: PrivateDaemon, name: str) -> str:
    return str(process(daemon, name)["state"])


def wait_state(daemon: PrivateDaemon, name: str, wanted: str, within_s: float = 20.0) -> None:
    wait_until(lambda: state(daemon, name) == wanted, within_s=within_s, what=f"{name} is {wanted}")


# -- workloads ------------------------------------------------------------------------------------


def workload(vram: str = "8M", *extra: str) -> list[str]:
    return [sys.executable, "-m", "gpusched.workload", "--vram", vram, *extra]


def start(daemon: PrivateDaemon, name: str, vram: str = "8M", *extra: str, **params: Any) -> int:
    """Runs a workload; its pid, once it is ready."""
    pid = int(ask(daemon, "run", name=name, cmd=workload(vram, *extra), **params)["pid"])
    wait_ready(daemon, name)
    return pid


def wait_ready(daemon: PrivateDaemon, name: str) -> None:
    wait_until(
        lambda: any("ready" in line for line in log_lines(daemon, name)),
        within_s=START_S,
        what=f"{name} is ready",
    )


def log_lines(daemon: PrivateDaemon, name: str) -> list[str]:
    return [str(line) for line in ask(daemon, "logs", name=name, lines=-1)["lines"]]


def digests(daemon: PrivateDaemon, name: str) -> list[str]:
    """Every digest that a workload has printed; the first is the right one."""
    return re.findall(r"^(?:ready|tick \d+) digest=(\w+)", "\n".join(log_lines(daemon, name)), re.M)


def prove_contents(daemon: PrivateDaemon, name: str) -> None:
    """Waits for one more look at VRAM by the active workload; all looks so far must have seen the same."""
    before = len(digests(daemon, name))
    wait_until(lambda: len(digests(daemon, name)) > before, within_s=20.0, what=f"{name} ticks on")
    assert len(set(digests(daemon, name))) == 1, log_lines(daemon, name)
    assert state(daemon, name) == "active"


def driver_state(daemon: PrivateDaemon, pid: int) -> DriverState:
    """What the simulated driver itself says, past the daemon."""
    return SimDriver(daemon.sim_dir).states([pid])[pid]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# -- other users ----------------------------------------------------------------------------------

_ASK = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(60)
    connection.connect(sys.argv[1])
    connection.sendall(sys.argv[2].encode() + b"\\n")
    print(connection.makefile().readline())
"""


@functools.cache
def others_python() -> str:
    """An interpreter of this version that every user may execute; the test is skipped where there is none."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with contextlib.suppress(OSError):
            if (
                run_as(
                    ALICE, [candidate, "-c", "import gpusched.daemon, msgspec, click"]
                ).returncode
                == 0
            ):
                return candidate
    pytest.skip(f"no {version} that other users may execute")


def others_env() -> dict[str, str]:
    """What lets ``others_python`` import this checkout and its dependencies."""
    paths = (str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(dict.fromkeys(paths))}


def others_workload(vram: str = "8M", *extra: str) -> dict[str, Any]:
    """The parameters of a ``run`` by another user."""
    cmd = [others_python(), *workload(vram, *extra)[1:]]
    return {"cmd": cmd, "env": others_env(), "dir": "/"}


def run_as(
    uid: int,
    argv: Sequence[str],
    *,
    groups: Sequence[int] = (),
    env: dict[str, str] | None = None,
    cwd: str = "/",
) -> subprocess.CompletedProcess[str]:
    """A program as another user: real uid, gid and groups."""
    return subprocess.run(
        argv,
        user=uid,
        group=uid,
        extra_groups=list(groups),
        env=others_env() | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def ask_as(
    uid: int, path: str, method: str, /, *, groups: Sequence[int] = (), **params: Any
) -> dict[str, Any]:
    """One raw request from a process of another user; the whole answer."""
    line = json.dumps({"method": method, "params": params})
    done = run_as(uid, [others_python(), "-I", "-S", "-c", _ASK, path, line], groups=groups)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
