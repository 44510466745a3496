"""A daemon of a test's own, on simulated GPUs: started, killed, restarted and ended for real.

Covers: the daemon's process, its directories, and the proof that nothing of it is left. Does not cover: requests
beyond ``status`` and ``kill``, which are sent as raw JSON lines so that ending a daemon does not depend on the SDK.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpusched.daemon import sim_directory

if TYPE_CHECKING:
    from gpusched import GpuSched

ROOT = Path(__file__).resolve().parent.parent
START_S = 20.0
STOP_S = 10.0
VANISH_S = 5.0


def wait_until(condition: Callable[[], object], *, within_s: float, what: str) -> None:
    """Returns when ``condition()`` is true; AssertionError naming ``what`` after ``within_s`` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.01)


def request(socket_path: str, method: str, within_s: float = 30.0, **params: Any) -> dict[str, Any]:
    """One request on a connection of its own; the whole response object, errors too."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(within_s)
        connection.connect(socket_path)
        connection.sendall(json.dumps({"method": method, "params": params}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            line = lines.readline()
    if not line:
        raise ConnectionResetError(f"the daemon closed the connection without answering {method}")
    answer: dict[str, Any] = json.loads(line)
    return answer


class PrivateDaemon:
    """``python -m gpusched daemon``, simulated unless said otherwise, in a directory below /tmp that others may enter.

    Attributes:
        directory: Holds everything else; short, because a Unix socket's path has at most 107 bytes.
        socket: The socket's path.
        state_dir: Journal and supervisors.
        sim_dir: The simulated VRAM, in shared memory.
        log_dir: Logs of managed processes.
        log: What all daemons of this directory wrote to stdout and stderr.

    ``user``: the daemon runs as this uid (and gid) instead of one's own.
    """

    def __init__(
        self,
        *,
        gpus: int = 1,
        vram: str = "4G",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        backend: str = "sim",
        user: int | None = None,
    ) -> None:
        simulated = ("--sim-gpus", str(gpus), "--sim-vram", vram) if backend == "sim" else ()
        self.directory = Path(tempfile.mkdtemp(prefix="gs-", dir="/tmp"))
        self.directory.chmod(0o755)
        self._user = user
        if user is not None:
            os.chown(self.directory, user, user)
        self.socket = str(self.directory / "s")
        self.state_dir = self.directory / "state"
        self.sim_dir = sim_directory(self.state_dir)
        self.log_dir = self.directory / "logs"
        self.log = self.directory / "daemon.log"
        self._command = [
            *(sys.executable, "-m", "gpusched", "-s", self.socket, "daemon"),
            *("--backend", backend, *simulated),
            *("--state-dir", str(self.state_dir), "--log-dir", str(self.log_dir)),
            *args,
        ]
        self._env = {k: v for k, v in os.environ.items() if not k.startswith("GPUSCHED_")}
        criu = os.environ.get("GPUSCHED_CRIU") or str(ROOT / ".criu/bin/criu")
        if Path(criu).exists():
            self._env["GPUSCHED_CRIU"] = criu
        self._env.update(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<PrivateDaemon {self.socket} {f'pid {self.pid}' if self.is_running else 'down'}>"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the daemon was never started"
        return self._process.pid

    def client(self) -> GpuSched:
        """A new SDK client; the daemon need not be up yet."""
        from gpusched import GpuSched

        return GpuSched(self.socket)

    def start(self) -> None:
        """Starts the daemon; returns when it answers ``status``. AssertionError, with its log, when it does not."""
        assert not self.is_running, "the daemon runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd=ROOT,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else (),
            )
        try:
            wait_until(self._answers, within_s=START_S, what="the daemon answers status")
        except AssertionError as error:
            self.kill9()
            raise AssertionError(f"{error}; its log:\n{self.log_text()}") from None

    def _answers(self) -> bool:
        assert self.is_running, f"the daemon ended by itself, status {self.returncode}"
        with contextlib.suppress(FileNotFoundError, ConnectionError):
            return bool(request(self.socket, "status")["ok"])
        return False

    @property
    def returncode(self) -> int | None:
        """The last daemon's exit status; negative: the signal that ended it; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def kill9(self) -> None:
        """SIGKILL for the daemon alone: what it manages lives on. Returns when it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_S)

    def restart(self) -> None:
        """A new daemon on the same directories, after ``kill9`` where one still runs."""
        self.kill9()
        self.start()

    def stop(self) -> int:
        """SIGTERM; the exit status. What the daemon manages lives on. AssertionError when it takes over 10 s."""
        assert self._process is not None, "the daemon was never started"
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise AssertionError(
                f"the daemon did not end within {STOP_S:g} s of SIGTERM; its log:\n{self.log_text()}"
            ) from None

    def log_text(self) -> str:
        """What the daemon wrote so far, the last 20,000 characters."""
        return self.log.read_text(errors="replace")[-20_000:] if self.log.exists() else ""

    def leftovers(self) -> dict[int, str]:
        """Processes (pid -> command line) that belong to this directory: they name it, or write a file in it."""
        return {pid: text for pid, text in _processes() if self._owns(pid, text)}

    def _owns(self, pid: int, command_line: str) -> bool:
        if pid == os.getpid():
            return False
        prefixes = (f"{self.directory}/", f"{self.sim_dir}/")
        if any(prefix in f"{command_line}/" for prefix in prefixes):
            return True
        with contextlib.suppress(OSError):  # gone, or another user's
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()).startswith(prefixes):
                        return True
        return False

    def end(self) -> None:
        """Ends everything: managed processes, then the daemon; AssertionError when anything is left.

        A daemon that the test killed is started once more: only it can tell what it manages. May be called again.
        """
        if not self.directory.exists():
            return
        try:
            if self._process is not None:
                self._end_all()
                wait_until(
                    lambda: not self.leftovers(), within_s=VANISH_S, what="every process is gone"
                )
        except AssertionError as error:
            raise AssertionError(f"{error}; left: {self.leftovers()}\n{self.log_text()}") from None
        finally:
            self.kill9()
            for pid in self.leftovers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if (pool := self.state_dir / "pool").is_mount():
                subprocess.run(["umount", "-l", str(pool)], check=False)
            for directory in (self.directory, self.sim_dir):
                shutil.rmtree(directory, ignore_errors=True)

    def _end_all(self) -> None:
        if not self.is_running:
            self.start()
        for process in request(self.socket, "status")["result"]["processes"]:
            answer = request(self.socket, "kill", name=process["name"], force=True)
            gone = answer["ok"] or answer.get("code") == "not_found"
            assert gone, f"kill {process['name']}: {answer}"
        try:
            wait_until(self._no_vram_left, within_s=VANISH_S, what=f"{self.sim_dir} is empty")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._vram_left()}") from None
        status = self.stop()
        assert status == 0, f"the daemon ended with status {status}"

    def _no_vram_left(self) -> bool:
        request(self.socket, "status")  # looking at the GPUs removes what dead processes left
        return not self._vram_left()

    def _vram_left(self) -> list[str]:
        found = (self.sim_dir.glob(each) for each in ("procs/*", "saved/*", "trees/*"))
        return [str(path.relative_to(self.sim_dir)) for each in found for path in each]


def _processes() -> Iterator[tuple[int, str]]:
    """Every process but zombies: pid and command line, arguments joined by blanks."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                text = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                if text:  # kernel threads and zombies have none
                    yield int(entry.name), text.strip()


def processes_naming(text: str) -> list[str]:
    """The command lines that have ``text`` in them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if text in line]
