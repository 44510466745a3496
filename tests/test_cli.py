"""The command line: what it prints, sends and exits with.

A scripted daemon stands at the other end of a real socket, so that every answer, also the odd ones, can be had.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import gpusched
from gpusched import errors
from gpusched.cli.main import COMMANDS, program
from gpusched.cli.process_commands import default_name
from gpusched.config import Settings

DEADLINE_S = 10.0
ROOT = Path(__file__).parents[1]

FROZEN = {"name": "policy", "duration_ms": 812, "tier": "ram", "mem_mb": 15400}
THAWED = {"name": "policy", "duration_ms": 502, "from_tier": "ram", "mem_mb": 15400}
ACQUIRED = {**THAWED, "lease": "l1", "expires_s": None}
POLICY: dict[str, Any] = {
    "name": "policy",
    "pid": 4711,
    "state": "active",
    "gpu": 0,
    "gpus": [0, 1],
    "mem_mb": 15400,
    "age": "5m12s",
    "started": "2026-01-02T03:04:05Z",
    "tier": "gpu",
    "user": "ann",
    "uid": 1000,
    "adopted": False,
    "evictable": True,
    "leases": 1,
    "op": None,
    "exit_code": None,
    "exit_signal": None,
    "error": None,
}
REWARD = {
    **POLICY,
    "name": "reward",
    "pid": 12,
    "state": "dead",
    "gpus": [0],
    "mem_mb": 0,
    "age": "3s",
    "evictable": False,
    "leases": 0,
    "exit_code": 3,
    "error": "gone\x1b[2J",
}
EVENTS: list[dict[str, Any]] = [
    {"time": "2026-01-02T03:04:05.000Z", "type": "run", "process": "policy"},
    {
        "time": "2026-01-02T03:04:06.000Z",
        "type": "freeze",
        "process": "policy",
        "duration_ms": 812,
        "detail": "to ram",
    },
]


def a_status(*processes: dict[str, Any], simulated: bool = False) -> dict[str, Any]:
    gpu = {"index": 0, "name": "Some GPU", "mem_total_mb": 81559, "mem_used_mb": 40000}
    return {
        "gpus": [{**gpu, "mem_free_mb": 41559, "uuid": "GPU-1"}],
        "processes": list(processes),
        "memory": {
            "host_ram_total_mb": 131072,
            "host_ram_free_mb": 98304,
            "host_ram_budget_mb": 104857,
            "snapshots_mb": 2048,
            "disk_used_mb": 0,
            "disk_budget_mb": 512000,
        },
        "metrics": {
            "requests": 9,
            "cache_hits": 0,
            "freezes": 2,
            "thaws": 1,
            "forks": 0,
            "migrations": 0,
            "hibernations": 0,
            "cold_starts": 0,
            "avg_freeze_ms": 812,
            "avg_thaw_ms": 502,
        },
        "recent_events": EVENTS,
        "capabilities": {"cuda_checkpoint": True, "criu": False, "simulated": simulated},
    }


@dataclass
class Streaming:
    """A first answer, then items; the daemon closes the connection afterwards if ``ends``."""

    first: Any
    items: Sequence[dict[str, Any]] = ()
    ends: bool = True


@dataclass
class FakeDaemon:
    """Answers with what the test put into ``answers`` (a value, an error, or a function of the parameters)."""

    path: Path
    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)  # last method of each connection that has ended
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        method = ""
        try:
            with connection, connection.makefile("rwb") as file:
                for line in file:
                    request = json.loads(line)
                    method = request["method"]
                    params = request.get("params", {})
                    with self.changed:
                        self.requests.append((method, params))
                        self.changed.notify_all()
                    if not self._answer(file, request["id"], method, params):
                        return
        except OSError:
            return
        finally:
            with self.changed:
                self.closed.append(method)
                self.changed.notify_all()

    def _answer(self, file: Any, request_id: int, method: str, params: dict[str, Any]) -> bool:
        answer = self.answers[method]
        if callable(answer):
            answer = answer(params)
        result = answer.first if isinstance(answer, Streaming) else answer
        if isinstance(result, errors.GpuschedError):
            lines = [errors.to_wire(result)]
        else:
            lines = [{"ok": True, "result": result, "id": request_id}]
        lines += answer.items if isinstance(answer, Streaming) else []
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        file.flush()
        return not (isinstance(answer, Streaming) and answer.ends)

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE_S)

    def asked(self, method: str) -> dict[str, Any]:
        """The parameters of the one request for ``method``."""
        (params,) = [params for name, params in self.requests if name == method]
        return params

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # its thread may have closed it
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    fake = FakeDaemon(tmp_path / "s.sock")
    monkeypatch.setenv("GPUSCHED_SOCKET", str(fake.path))
    yield fake
    fake.close()


def call(*args: str) -> Result:
    result = CliRunner().invoke(program, args, prog_name="gpusched")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


_STARTED: list[subprocess.Popen[Any]] = []


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """A test that fails must not leave programs behind."""
    yield
    for process in _STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    _STARTED.clear()


def start(*args: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpusched", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env=env,
    )
    _STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self._fd, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "110"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpusched", *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        _STARTED.append(self.process)
        os.close(theirs)
        self.text = ""

    def read_until(self, wanted: str | None) -> str:
        """All text up to ``wanted``, or to the end."""
        while wanted is None or wanted not in self.text:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # the other side is gone
                data = b""
            if not data:
                break
            self.text += data.decode()
        return self.text

    def finish(self) -> str:
        text = self.read_until(None)
        self.process.wait(DEADLINE_S)
        os.close(self._fd)
        return text


# -- lines that scripts grep for ------------------------------------------------------------------

LINES: list[tuple[str, Any, str, dict[str, Any]]] = [
    (
        "freeze policy",
        FROZEN,
        "Frozen policy → ram (812 ms)",
        {"name": "policy"},
    ),
    (
        "freeze --force policy",
        FROZEN,
        "Frozen policy → ram (812 ms)",
        {"name": "policy", "force": True},
    ),
    ("thaw policy", THAWED, "Thawed policy ← ram (502 ms)", {"name": "policy"}),
    (
        "thaw policy --evict",
        {**THAWED, "evicted": ["a", "b"]},
        "Thawed policy ← ram (502 ms)\nEvicted a, b",
        {"name": "policy", "evict": True},
    ),
    ("kill policy", {"name": "policy"}, "Killed policy", {"name": "policy"}),
    ("kill policy --force", {"name": "policy"}, "Killed policy", {"name": "policy", "force": True}),
    (
        "migrate policy --to 1",
        {"name": "policy", "from_gpu": 0, "to_gpu": 1, "duration_ms": 9},
        "Migrated policy: GPU 0 → GPU 1",
        {"name": "policy", "gpu": 1},
    ),
    (
        "migrate policy --to 1,0 --force",
        {"name": "policy", "from_gpu": 0, "to_gpu": 1, "duration_ms": 9},
        "Migrated policy: GPU 0 → GPU 1",
        {"name": "policy", "gpus": [1, 0], "force": True},
    ),
    (
        "adopt --pid 4711 --name policy --evictable",
        {"name": "policy", "pid": 4711, "mem_mb": 3},
        "Adopted policy (pid=4711)",
        {"name": "policy", "pid": 4711, "evictable": True},
    ),
    (
        "swap reward policy",
        {"duration_ms": 9, "off": [{**FROZEN, "name": "reward"}], "on": [THAWED]},
        "Frozen reward → ram (812 ms)\nThawed policy ← ram (502 ms)",
        {"off": ["reward"], "on": ["policy"]},
    ),
    (
        "swap a,b policy --force",
        {"duration_ms": 9, "off": [FROZEN, FROZEN], "on": [THAWED]},
        "Frozen policy → ram (812 ms)\n" * 2 + "Thawed policy ← ram (502 ms)",
        {"off": ["a", "b"], "on": ["policy"], "force": True},
    ),
    (
        "acquire policy --for 1h30m --evict",
        {**ACQUIRED, "expires_s": 5400.0},
        "Acquired policy ← ram (502 ms), for 1h30m",
        {"name": "policy", "for_s": 5400.0, "evict": True},
    ),
    (
        "release policy",
        {"name": "policy", "released": 1},
        "Released policy (1 lease)",
        {"name": "policy"},
    ),
    (
        "release policy",
        {"name": "policy", "released": 0},
        "Released policy (0 leases)",
        {"name": "policy"},
    ),
    (
        "logs policy -n 2",
        {"name": "policy", "lines": ["\x1b[31mone", "two"], "output": "one\ntwo"},
        "\x1b[31mone\ntwo",
        {"name": "policy", "lines": 2},
    ),
]


@pytest.mark.parametrize(("line", "result", "printed", "sent"), LINES)
def test_a_command_sends_its_request_and_prints_its_line(
    daemon: FakeDaemon, line: str, result: Any, printed: str, sent: dict[str, Any]
) -> None:
    method = line.split()[0]
    daemon.answers[method] = result
    done = call(*line.split())
    assert (done.exit_code, done.stdout, done.stderr) == (0, printed + "\n", "")
    assert daemon.asked(method) == sent


@pytest.mark.parametrize(("line", "result", "_printed", "_sent"), LINES)
def test_json_prints_the_result_as_it_came(
    daemon: FakeDaemon, line: str, result: Any, _printed: str, _sent: object
) -> None:
    daemon.answers[line.split()[0]] = result
    done = call(*line.split(), "--json")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout) == result


@pytest.mark.parametrize(
    ("line", "result", "printed"),
    [
        ("freeze policy", FROZEN, "Frozen policy → ram (812 ms) [simulated]"),
        ("thaw policy", THAWED, "Thawed policy ← ram (502 ms) [simulated]"),
    ],
)
def test_a_simulated_figure_says_so_behind_the_exact_text(
    daemon: FakeDaemon, line: str, result: dict[str, Any], printed: str
) -> None:
    daemon.answers[line.split()[0]] = {**result, "simulated": True}
    assert call(*line.split()).stdout == printed + "\n"


# -- run ------------------------------------------------------------------------------------------


def test_run_sends_the_callers_directory_and_environment(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLOUR", "blåu")
    daemon.answers["run"] = {"name": "train", "pid": 4711}
    done = call("run", "-n", "train", "-g", "2", "--", "python", "train.py", "-n", "3")
    assert done.stdout == "Started train (pid=4711)\n"
    sent = daemon.asked("run")
    assert sent.pop("env")["COLOUR"] == "blåu"
    assert sent == {
        "name": "train",
        "cmd": ["python", "train.py", "-n", "3"],
        "dir": str(tmp_path),
        "gpu": 2,
    }


def test_run_without_dashes_leaves_the_commands_options_alone(daemon: FakeDaemon) -> None:
    daemon.answers["run"] = {"name": "sh", "pid": 1}
    assert call("run", "--evictable", "/bin/sh", "-c", "exit").exit_code == 0
    sent = daemon.asked("run")
    assert (sent["name"], sent["cmd"], sent["evictable"]) == ("sh", ["/bin/sh", "-c", "exit"], True)


def test_run_takes_several_gpus_and_a_relative_directory(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    daemon.answers["run"] = {"name": "x", "pid": 1}
    assert (
        json.loads(call("run", "--json", "--gpu", "0,1", "-d", "a/..", "--", "x").stdout)["pid"]
        == 1
    )
    sent = daemon.asked("run")
    assert (sent["gpus"], sent.get("gpu"), sent["dir"]) == ([0, 1], None, str(tmp_path))


def test_run_from_a_directory_that_is_gone_asks_for_one(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    done = call("run", "--", "x")
    assert done.exit_code == 2 and "name one with --dir" in done.stderr and not daemon.requests


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python", "python"),
        ("/opt/my models/train@v2.sh", "train-v2.sh"),
        ("./.hidden", "hidden"),
        ("é_x", "x"),
        ("x" * 80, "x" * 64),
    ],
)
def test_the_default_name_is_the_commands_made_legal(command: str, name: str) -> None:
    assert default_name(command) == name


def test_a_command_that_makes_no_name_needs_one(daemon: FakeDaemon) -> None:
    done = call("run", "--", "@@@")
    assert done.exit_code == 2 and "--name" in done.stderr and not daemon.requests


# -- errors and exit codes ------------------------------------------------------------------------

FAMILIES = [
    (errors.NotFound("no process named 'policy'"), 3),
    (errors.InsufficientHostMemory("policy needs 15.0 GiB"), 4),
    (errors.DriverError("restore failed"), 5),
    (errors.ProcessLost("policy is gone"), 6),
    (errors.InternalError("a defect"), 1),
]


@pytest.mark.parametrize(("error", "code"), FAMILIES)
def test_an_error_is_a_message_on_stderr_and_its_familys_exit_code(
    daemon: FakeDaemon, error: errors.GpuschedError, code: int
) -> None:
    daemon.answers["freeze"] = error
    done = call("freeze", "policy")
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"error: {error.message}\n")


def test_with_json_the_error_is_one_object_on_stderr(daemon: FakeDaemon) -> None:
    daemon.answers["kill"] = errors.LeaseHeld("policy is leased", {"by": "ann"})
    done = call("kill", "policy", "--json")
    assert (done.exit_code, done.stdout) == (3, "")
    told = json.loads(done.stderr)
    assert told.pop("details")["by"] == "ann"
    assert told == {
        "ok": False,
        "error": "policy is leased",
        "code": "lease_held",
        "retryable": True,
    }


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("thaw x", errors.DriverError("bad", {"hint": "try\nharder"}), "try\nharder"),
        ("freeze x", errors.LeaseHeld("leased"), "--force"),
        ("thaw x", errors.InsufficientGpuMemory("short"), "--evict"),
        ("run -- x", errors.AlreadyExists("x exists"), "--name"),
    ],
)
def test_a_hint_says_what_to_do(
    daemon: FakeDaemon, line: str, error: errors.GpuschedError, hint: str
) -> None:
    daemon.answers[line.split()[0]] = error
    first, _, rest = call(*line.split()).stderr.partition("\n")
    assert first == f"error: {error.message}"
    assert rest.startswith("hint: ") and hint in rest


def test_a_hint_does_not_say_what_the_error_says_already(daemon: FakeDaemon) -> None:
    daemon.answers["freeze"] = errors.LeaseHeld("leased; wait or use --force")
    assert call("freeze", "x").stderr == "error: leased; wait or use --force\n"


def test_an_error_cannot_steer_the_terminal(daemon: FakeDaemon) -> None:
    daemon.answers["thaw"] = errors.DriverError("bad\x1b[2Jthing")
    assert call("thaw", "x").stderr == "error: bad [2Jthing\n"


def test_without_a_daemon_it_says_how_to_start_one(tmp_path: Path) -> None:
    done = call("-s", str(tmp_path / "none"), "status")
    assert done.exit_code == 6
    assert "daemon is not running" in done.stderr and "gpusched daemon" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "freeze",
        "no-such-command",
        "run",
        "run -g x -- true",
        "run -g 0,0 -- true",
        "run -g -1 -- true",
        "migrate policy",
        "migrate policy --to GPU1",
        "swap a, b",
        "adopt --pid 0 --name x",
        "adopt --pid 5",
        "acquire policy --for 10parsecs",
        "acquire policy --for 0",
        "acquire policy --for 10s -- true",
        "acquire policy --json -- true",
        "wait policy --timeout soon",
        "logs policy -n many",
        "rescue abc",
        "daemon --ram-budget lots",
        "daemon --sim-vram 1X",
        "daemon --backend metal",
        "daemon --sim-gpus 0",
        "completion tcsh",
    ],
)
def test_a_mistake_in_the_line_is_a_usage_error_and_sends_nothing(
    daemon: FakeDaemon, line: str
) -> None:
    done = call(*line.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: gpusched")
    assert "\nerror: " in done.stderr and "--help" in done.stderr
    assert not daemon.requests


def test_no_command_shows_the_help_with_every_command() -> None:
    done = call()
    assert done.exit_code == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "..." not in done.stdout.partition("Commands:")[2]  # no sentence was cut


def test_version() -> None:
    assert call("--version").stdout == f"gpusched {gpusched.__version__}\n"


@pytest.mark.parametrize("where", ["before", "after", "environment"])
def test_the_socket_can_be_given_anywhere(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    daemon.answers["kill"] = {"name": "x"}
    if where != "environment":
        monkeypatch.setenv("GPUSCHED_SOCKET", "/nonexistent/socket")
    option = ["--socket", str(daemon.path)]
    line = {"before": [*option, "kill", "x"], "after": ["kill", *option, "x"]}.get(
        where, ["kill", "x"]
    )
    assert call(*line).stdout == "Killed x\n"


# -- status ---------------------------------------------------------------------------------------

PLAIN_STATUS = """\
GPU  TOTAL_MB  USED_MB  FREE_MB  NAME
0    81559     40000    41559    Some GPU

NAME    STATE   TIER  GPU  MEM_MB  AGE    PID   USER  NOTES
policy  active  gpu   0,1  15400   5m12s  4711  ann   leased, evictable
reward  dead    gpu   0    0       3s     12    ann   exit 3, gone [2J

RAM_TOTAL_MB  RAM_FREE_MB  SNAPSHOTS_MB  BUDGET_MB
131072        98304        2048          104857
"""


def test_status_in_a_pipe_is_plain_columns(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status(POLICY, REWARD)
    assert call("status").stdout == PLAIN_STATUS


def test_status_json_is_the_result_as_one_value(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status(POLICY, REWARD)
    assert json.loads(call("status", "--json").stdout) == daemon.answers["status"]


def test_status_understands_the_original_fields_alone(daemon: FakeDaemon) -> None:
    original = ("name", "pid", "state", "gpu", "mem_mb", "age", "started", "tier")
    daemon.answers["status"] = a_status({key: POLICY[key] for key in original})
    assert "policy  active  gpu   0    15400   5m12s  4711  -     -\n" in call("status").stdout


def test_simulated_gpus_are_marked_in_status(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status(simulated=True)
    assert "  Some GPU [simulated]\n" in call("status").stdout


def test_status_on_a_terminal_has_bars_and_colours(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status(POLICY, REWARD, simulated=True)
    text = Terminal("status").finish()
    assert "█" * 10 + "\x1b" in text and "░" * 10 in text
    for part in ("GPU 0", "39.1 GiB", "79.6 GiB", "policy", "15.0 GiB", "5m12s", "RAM", "2.0 GiB"):
        assert part in text
    assert "Some GPU [simulated]" in text and "2 freezes (average 812 ms)" in text
    assert "reward: gone [2J" in text and "\x1b[2J" not in text and "RAM_TOTAL_MB" not in text


def test_status_on_a_terminal_without_processes_says_how_to_start_one(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status()
    assert "gpusched run" in Terminal("status").finish()


def test_status_loads_nothing_that_it_does_not_need(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status(POLICY)
    heavy = {"rich", "msgspec", "asyncio", "cuda", "pynvml", "psutil", "subprocess", "dataclasses"}
    heavy |= {"gpusched.config", "gpusched.aio", "importlib.metadata", "click.testing"}
    code = (
        "import sys\nfrom gpusched.cli.main import program\n"
        "program(['status'], standalone_mode=False)\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_status_answers_at_once_python_included(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status(POLICY)
    took_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert finish(start("status"))[0] == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Time on the processor: the same on an idle and on a busy machine.
        took_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took_s) < 0.150


# -- a terminal -----------------------------------------------------------------------------------


def test_a_line_on_a_terminal_is_coloured_with_the_same_text(daemon: FakeDaemon) -> None:
    daemon.answers["freeze"] = FROZEN
    text = Terminal("freeze", "policy").finish()
    assert "Frozen\x1b[0m policy → ram (812 ms)" in text


def test_no_color_means_none(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    daemon.answers |= {"freeze": FROZEN, "status": a_status(POLICY)}
    assert Terminal("freeze", "policy").finish() == "Frozen policy → ram (812 ms)\r\n"
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", Terminal("status").finish())


def test_waiting_shows_progress_and_takes_it_away(daemon: FakeDaemon) -> None:
    shown = threading.Event()

    def answer(_: dict[str, Any]) -> Any:
        assert shown.wait(DEADLINE_S)
        return FROZEN

    daemon.answers["freeze"] = answer
    terminal = Terminal("freeze", "policy")
    try:
        assert "0:00:0" in terminal.read_until("0:00:0") and "Freezing policy" in terminal.text
    finally:
        shown.set()
    assert "policy → ram (812 ms)" in terminal.finish().rpartition("Freezing policy")[2]


def test_interrupting_is_quiet(daemon: FakeDaemon) -> None:
    release = threading.Event()
    daemon.answers["freeze"] = lambda _: release.wait(DEADLINE_S) and FROZEN
    process = start("freeze", "policy")
    daemon.wait(lambda: bool(daemon.requests))
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "")
    release.set()


def test_a_reader_that_has_enough_is_no_error(daemon: FakeDaemon) -> None:
    lines = ["x" * 1000] * 1000
    daemon.answers["logs"] = {"name": "policy", "lines": lines, "output": ""}
    process = start("logs", "policy", "-n", "-1")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.wait(DEADLINE_S) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# -- logs, events, wait ---------------------------------------------------------------------------


def test_following_logs_prints_old_and_new_lines(daemon: FakeDaemon) -> None:
    first = {"name": "policy", "lines": ["one"], "output": "one"}
    daemon.answers["logs"] = Streaming(first, [{"line": "two"}])
    assert call("logs", "-f", "policy").stdout == "one\ntwo\n"
    lines = call("logs", "-f", "policy", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"line": "one"}, {"line": "two"}]
    assert daemon.requests[0] == ("logs", {"name": "policy", "lines": 50, "follow": True})


PLAIN_EVENTS = """\
2026-01-02T03:04:05.000Z  run         policy                    -  -
2026-01-02T03:04:06.000Z  freeze      policy               812 ms  to ram
"""


def test_events_are_columns_or_json_lines(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status()
    assert call("events").stdout == PLAIN_EVENTS
    assert [json.loads(line) for line in call("events", "--json").stdout.splitlines()] == EVENTS


def test_following_events_goes_on_from_the_last_ones_until_the_daemon_ends(
    daemon: FakeDaemon,
) -> None:
    daemon.answers["subscribe"] = Streaming(a_status(), [{**EVENTS[0], "type": "thaw"}])
    done = call("events", "-f")
    assert done.stdout.startswith(PLAIN_EVENTS) and done.stdout.splitlines()[2].split()[1] == "thaw"
    assert done.exit_code == 6


def in_turn(*answers: Any) -> Callable[[object], Any]:
    """One answer after the other; the last one again and again."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def test_wait_returns_when_vram_is_held(daemon: FakeDaemon) -> None:
    loading = {**POLICY, "mem_mb": 0}
    daemon.answers["status"] = in_turn(a_status(), a_status(loading), a_status(POLICY))
    done = call("wait", "policy")
    assert (done.exit_code, done.stdout) == (0, "Ready policy (15400 MiB)\n")
    assert json.loads(call("wait", "policy", "--json").stdout) == POLICY


def test_wait_gives_up_after_its_time_or_when_the_process_has_died(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status({**POLICY, "mem_mb": 0})
    done = call("wait", "policy", "--timeout", "10ms")
    assert done.exit_code == 6 and "not ready within" in done.stderr
    daemon.answers["status"] = a_status(REWARD)
    assert call("wait", "reward").exit_code == 6


@pytest.mark.parametrize(
    ("ended", "code"),
    [({"exit_code": 0}, 0), ({"exit_code": 42}, 42), ({"exit_signal": 9}, 137), ({}, 6)],
)
def test_wait_exit_ends_as_the_process_did(
    daemon: FakeDaemon, ended: dict[str, Any], code: int
) -> None:
    dead = {**POLICY, "state": "dead", **ended}
    daemon.answers["status"] = in_turn(a_status(POLICY), a_status(dead))
    assert call("wait", "--exit", "policy").exit_code == code
    told = call("wait", "--exit", "policy", "--json")
    assert (told.exit_code, json.loads(told.stdout)) == (code, dead)


@pytest.mark.parametrize(
    ("later", "code", "text"),
    [
        (a_status(), 6, "killed and forgotten"),
        (a_status({**POLICY, "pid": 99}), 6, "another process"),
        (a_status(POLICY), 6, "still runs after 0.15 s"),
    ],
)
def test_wait_exit_says_why_there_is_no_exit_code(
    daemon: FakeDaemon, later: Any, code: int, text: str
) -> None:
    daemon.answers["status"] = in_turn(a_status(POLICY), later)
    done = call("wait", "--exit", "policy", "--timeout", "150ms")
    assert done.exit_code == code and text in done.stderr


def test_wait_exit_for_an_unknown_name_does_not_wait(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status()
    done = call("wait", "--exit", "policy")
    assert done.exit_code == 3 and "policy" in done.stderr


# -- leases ---------------------------------------------------------------------------------------


def test_a_lease_lasts_as_long_as_its_command(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["acquire"] = ACQUIRED
    go = tmp_path / "go"
    os.mkfifo(go)
    process = start(
        "acquire", "policy", "--evict", "--", "sh", "-c", f"read line < {go}; echo $line; exit 7"
    )
    with go.open("w") as pipe:  # opens when the command runs
        assert daemon.asked("acquire") == {"name": "policy", "evict": True}
        assert daemon.closed == []
        pipe.write("hello\n")
    assert finish(process) == (7, "hello\n", "")
    daemon.wait(lambda: daemon.closed == ["acquire"])


LEASED_PROGRAM = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("ready", flush=True)
signal.pause()
"""


def test_ending_a_leasing_program_ends_its_command_first(daemon: FakeDaemon) -> None:
    daemon.answers["acquire"] = ACQUIRED
    process = start("acquire", "policy", "--", sys.executable, "-c", LEASED_PROGRAM)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (5, "", "")


def test_a_command_killed_by_a_signal_gives_a_shells_exit_code(daemon: FakeDaemon) -> None:
    daemon.answers["acquire"] = ACQUIRED
    assert finish(start("acquire", "policy", "--", "sh", "-c", "kill -9 $$"))[0] == 137


def test_a_command_that_is_not_there_moves_nothing(daemon: FakeDaemon) -> None:
    done = call("acquire", "policy", "--", "no-such-program-anywhere")
    assert (done.exit_code, done.stderr) == (
        127,
        "error: no-such-program-anywhere: command not found\n",
    )
    assert daemon.requests == []


def test_a_lease_that_is_refused_runs_nothing(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["acquire"] = errors.InsufficientGpuMemory("no room")
    done = call("acquire", "policy", "--", "touch", str(tmp_path / "ran"))
    assert done.exit_code == 4 and "--evict" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_lease_without_end_is_held_until_interrupted(daemon: FakeDaemon) -> None:
    daemon.answers |= {"acquire": ACQUIRED, "subscribe": Streaming(a_status(), ends=False)}
    process = start("acquire", "policy")
    assert process.stdout is not None
    assert process.stdout.readline() == "Acquired policy ← ram (502 ms), until interrupted\n"
    assert daemon.closed == []
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "")
    daemon.wait(lambda: sorted(daemon.closed) == ["acquire", "subscribe"])


@pytest.mark.parametrize(
    ("items", "text"),
    [([{**EVENTS[0], "type": "exit"}], "policy has ended"), ([EVENTS[0]], "closed the connection")],
)
def test_a_lease_on_nothing_is_not_held(daemon: FakeDaemon, items: Any, text: str) -> None:
    daemon.answers |= {"acquire": ACQUIRED, "subscribe": Streaming(a_status(), items)}
    done = call("acquire", "policy", "--json")
    assert json.loads(done.stdout) == ACQUIRED
    assert done.exit_code == 6 and text in json.loads(done.stderr)["error"]


# -- commands without a daemon --------------------------------------------------------------------


def test_daemon_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Settings] = []

    def run_daemon(settings: Settings) -> int:
        started.append(settings)
        return 9

    monkeypatch.setattr("gpusched.daemon.main", run_daemon)
    file = tmp_path / "config.toml"
    file.write_text(
        'socket = "/from/file"\ngroup = "staff"\nram_budget = "1G"\nallow_old_driver = true\n'
    )
    options = "--backend sim --sim-gpus 2 --sim-vram 512 --ram-budget 80G --disk-budget 1T"
    done = call("daemon", "--config", str(file), *options.split(), "--state-dir", str(tmp_path))
    assert done.exit_code == 9
    (settings,) = started
    assert (settings.backend, settings.sim_gpus, settings.sim_vram_bytes) == ("sim", 2, 512 << 20)
    assert (settings.ram_budget_bytes, settings.disk_budget_bytes) == (80 << 30, 1 << 40)
    assert (settings.state_dir, settings.socket_path) == (tmp_path, Path("/from/file"))
    assert (settings.group, settings.allow_old_driver) == ("staff", True)

    call(
        "-s",
        str(tmp_path / "s"),
        "daemon",
        "--config",
        str(file),
        "--allow-old-driver",
        "--group",
        "g",
    )
    assert (started[1].socket_path, started[1].group) == (tmp_path / "s", "g")
    assert started[1].allow_old_driver


def test_a_bad_config_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("backend = 5\n")
    done = call("daemon", "--config", str(file))
    assert done.exit_code == 3 and str(file) in done.stderr and "backend" in done.stderr


def test_rescue_shows_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    def rescue(pid: int) -> dict[str, Any]:
        one = {"pid": pid, "before": "checkpointed", "after": "running"}
        return {"pid": pid, "processes": [one], "message": "1 process runs again"}

    monkeypatch.setattr("gpusched.rescue.rescue", rescue)
    done = call("rescue", "7")
    assert (
        done.stdout
        == "PID  BEFORE        AFTER\n7    checkpointed  running\n1 process runs again\n"
    )
    assert json.loads(call("rescue", "7", "--json").stdout)["pid"] == 7


def test_rescuing_nothing_is_an_error() -> None:
    done = call("rescue", str(2**22 + 1))  # above every pid
    assert done.exit_code == 3 and "no process" in done.stderr


# -- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str) -> None:
    done = call("completion", shell)
    assert done.exit_code == 0 and f"_GPUSCHED_COMPLETE={shell}_complete" in done.stdout


def complete(words: str, *, socket_path: str | None = None) -> tuple[int, list[str], str]:
    """What pressing TAB behind ``words`` offers."""
    more = {"_GPUSCHED_COMPLETE": "bash_complete", "COMP_WORDS": words}
    more["COMP_CWORD"] = str(words.count(" "))
    if socket_path:
        more["GPUSCHED_SOCKET"] = socket_path
    code, out, err = finish(start(env={**os.environ, **more}))
    return code, [line.partition(",")[2] for line in out.splitlines() if line], err


def test_names_are_completed_from_the_running_daemon(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = a_status(POLICY, REWARD)
    assert complete("gpusched freeze po") == (0, ["policy"], "")
    assert complete("gpusched swap reward,") == (0, ["reward,policy", "reward,reward"], "")
    away = "/nonexistent/socket"
    behind = f"gpusched thaw -s {daemon.path} "
    assert complete(behind, socket_path=away) == (0, ["policy", "reward"], "")


def test_completion_without_a_daemon_is_silent(daemon: FakeDaemon) -> None:
    assert complete("gpusched freeze p", socket_path="/nonexistent/socket") == (0, [], "")
    daemon.answers["status"] = errors.InternalError("oops")
    assert complete("gpusched freeze p") == (0, [], "")


# -- documentation --------------------------------------------------------------------------------


def test_the_documentation_has_every_command_option_and_exit_code() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    context = click.Context(program)
    for name in COMMANDS:
        assert f"`gpusched {name}" in text or f"\n### {name}" in text, name
        command = program.get_command(context, name)
        assert command is not None
        section = text.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        for param in command.params:
            if isinstance(param, click.Option) and param.name != "as_json":
                assert f"`{max(param.opts, key=len)}" in section, (name, param.opts)
    for family in errors.Family:
        assert f"| {family.value} |" in text, family
