"""The synchronous SDK against a scripted server: what is asked, what comes back, errors, readiness."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import original_sdk
from gpusched import GpuSched, _requests, errors
from gpusched.aio import AsyncGpuSched
from gpusched.protocol import codec
from gpusched.protocol.methods import METHODS
from scripted_server import (
    STATUS,
    Peer,
    ScriptedServer,
    answer_all,
    status_of,
    statuses,
)

# -- requests and results -----------------------------------------------------------------------------

CALLS: list[tuple[str, Callable[[GpuSched], Any], dict[str, Any]]] = [
    ("freeze", lambda gs: gs.freeze("a"), {"name": "a"}),
    ("freeze", lambda gs: gs.freeze("a", force=True), {"name": "a", "force": True}),
    ("thaw", lambda gs: gs.thaw("a"), {"name": "a"}),
    ("thaw", lambda gs: gs.thaw("a", evict=True), {"name": "a", "evict": True}),
    ("kill", lambda gs: gs.kill("a"), {"name": "a"}),
    ("kill", lambda gs: gs.kill("a", force=True), {"name": "a", "force": True}),
    ("hibernate", lambda gs: gs.hibernate("a"), {"name": "a"}),
    ("adopt", lambda gs: gs.adopt(42, "a"), {"pid": 42, "name": "a"}),
    (
        "adopt",
        lambda gs: gs.adopt(42, "a", evictable=True),
        {"pid": 42, "name": "a", "evictable": True},
    ),
    (
        "adopt",
        lambda gs: gs.adopt(42, "a", stop=False),
        {"pid": 42, "name": "a", "stop": False},
    ),
    ("migrate", lambda gs: gs.migrate("a", 0), {"name": "a", "gpu": 0}),
    (
        "migrate",
        lambda gs: gs.migrate("a", gpus=(1, 0), force=True),
        {"name": "a", "gpus": [1, 0], "force": True},
    ),
    ("fork", lambda gs: gs.fork("a"), {"name": "a", "copies": 2}),
    ("fork", lambda gs: gs.fork("a", 3, [0, 1]), {"name": "a", "copies": 3, "gpus": [0, 1]}),
    ("acquire", lambda gs: gs.acquire("a", for_s=600.0), {"name": "a", "for_s": 600.0}),
    (
        "acquire",
        lambda gs: gs.acquire("a", evict=True),
        {"name": "a", "evict": True},
    ),
    ("status", lambda gs: gs.status(), {}),
    ("logs", lambda gs: gs.logs("a"), {"name": "a", "lines": 50}),
    ("logs", lambda gs: gs.logs("a", -1), {"name": "a", "lines": -1}),
    (
        "run",
        lambda gs: gs.run("a", ["x", Path("y")], 1, dir="/tmp", env={"A": "b"}),
        {"name": "a", "cmd": ["x", "y"], "gpu": 1, "dir": "/tmp", "env": {"A": "b"}},
    ),
    (
        "run",
        lambda gs: gs.run("a", ("x",), gpus=[0, 1], dir="/", env={}, evictable=True),
        {"name": "a", "cmd": ["x"], "gpus": [0, 1], "dir": "/", "env": {}, "evictable": True},
    ),
    ("anything", lambda gs: gs.call("anything", a=1, b=None, c=[]), {"a": 1, "c": []}),
]


@pytest.mark.parametrize(("method", "act", "params"), CALLS)
def test_each_method_sends_its_request_and_returns_the_result(
    method: str, act: Callable[[GpuSched], Any], params: dict[str, Any], tmp_path: Path
) -> None:
    result = {"name": "a", "anything": [1, None, "é"]}
    with ScriptedServer(tmp_path, answer_all({method: result})) as server:
        with GpuSched(server.path) as gs:
            assert act(gs) == result

        [(_, request)] = server.requests
    assert request == {"id": 1, "method": method, "params": params}


def test_run_sends_the_callers_folder_and_environment_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "größe")
    monkeypatch.setitem(os.environ, "NOT_UTF8", os.fsdecode(b"\xff"))
    with (
        ScriptedServer(tmp_path, answer_all({"run": {}})) as server,
        GpuSched(server.path) as gs,
    ):
        gs.run("a", ["x"])
        gs.run("a", ["x"], dir="sub")

    first, second = (request["params"] for _, request in server.requests)
    assert first["dir"] == str(tmp_path)
    assert first["env"] == {k: v for k, v in os.environ.items() if k != "NOT_UTF8"}
    assert first["env"]["MODEL"] == "größe"
    assert second["dir"] == str(tmp_path / "sub")


def test_swap_is_one_request_and_returns_each_side_as_it_was_given(tmp_path: Path) -> None:
    off: Any = [{"name": "a"}, {"name": "b"}]
    on: Any = [{"name": "c"}]
    swapped = {"swap": {"duration_ms": 5, "off": off, "on": on}}
    with ScriptedServer(tmp_path, answer_all(swapped)) as server, GpuSched(server.path) as gs:
        frozen, thawed = gs.swap("a", "c")
        assert (frozen["name"], thawed["name"]) == ("a", "c")
        assert gs.swap(["a", "b"], ("c",), force=True) == (off, on)
        assert gs.swap(["a", "b"], "c") == (off, on[0])

    assert [request["params"] for _, request in server.requests] == [
        {"off": "a", "on": "c"},
        {"off": ["a", "b"], "on": ["c"], "force": True},
        {"off": ["a", "b"], "on": "c"},
    ]


def test_what_status_tells_about_gpus_and_processes(tmp_path: Path) -> None:
    with (
        ScriptedServer(tmp_path, answer_all({"status": STATUS})) as server,
        GpuSched(server.path) as gs,
    ):
        assert gs.processes() == STATUS["processes"]
        assert gs.gpu_free_mb() == 79500
        assert gs.gpu_free_mb(1) == 0
        with pytest.raises(errors.NotFound, match=r"no GPU 2; the daemon manages: 0, 1"):
            gs.gpu_free_mb(2)


def test_a_result_of_the_wrong_shape_is_a_protocol_mismatch(tmp_path: Path) -> None:
    with (
        ScriptedServer(tmp_path, answer_all({"swap": "ok"})) as server,
        GpuSched(server.path) as gs,
        pytest.raises(errors.ProtocolMismatch, match="swap"),
    ):
        gs.swap("a", "b")


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda gs: gs.run("a", "python train.py"), r"\['python', 'train.py'\]"),
        (lambda gs: gs.run("a", ["x" * codec.MAX_LINE_BYTES], env={}), "the daemon reads 1048576"),
        (lambda gs: gs.run("a", [os.fsdecode(b"\xff")], env={}), "cannot be sent as JSON"),
        (lambda gs: gs.call("x", y=object()), "cannot be sent as JSON"),
        (lambda gs: gs.call("subscribe"), "use events"),
        (lambda gs: gs.call("logs", name="a", follow=True), "use events"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_is_sent(
    act: Callable[[GpuSched], Any], text: str, tmp_path: Path
) -> None:
    with ScriptedServer(tmp_path, answer_all({})) as server:
        with GpuSched(server.path) as gs, pytest.raises(errors.InvalidRequest, match=text):
            act(gs)
        assert server.requests == []


def test_the_methods_that_may_be_repeated_are_those_of_the_protocol() -> None:
    assert {name for name, method in METHODS.items() if method.idempotent} == _requests.IDEMPOTENT


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def surface(client: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [
                (p.name, p.kind, p.default) for p in inspect.signature(member).parameters.values()
            ]
            for name, member in vars(client).items()
            if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_"))
        }

    assert surface(GpuSched) == surface(AsyncGpuSched)
    assert {"run", "swap", "on_gpu", "events", "follow_logs"} <= surface(GpuSched).keys()


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [*errors.BY_CODE, "a_code_of_tomorrow", None])
def test_an_error_response_raises_the_class_of_its_code(code: str | None, tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        for request in peer.requests():
            if request["method"] == "freeze":
                more = {"code": code, "details": {"need": 3}} if code else {}
                peer.refuse("no: 3 GiB missing", **more)
            else:
                peer.answer(STATUS)

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        with pytest.raises(RuntimeError) as caught:
            gs.freeze("a")
        assert gs.status() == STATUS
        assert server.connections == 1, "an error response leaves the connection usable"

    assert type(caught.value) is errors.BY_CODE.get(code or "", errors.GpuschedError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value) == "no: 3 GiB missing"
    assert again.details == ({"need": 3} if code else {})


def test_without_a_daemon_the_error_says_how_to_start_it(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    with pytest.raises(ConnectionError, match="daemon is not running") as caught:
        GpuSched(path).status()
    assert isinstance(caught.value, RuntimeError)
    assert "sudo gpusched daemon" in str(caught.value)
    assert path in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is errors.DaemonUnavailable
    assert str(again) == str(caught.value)


def test_a_socket_that_nobody_serves_any_more_means_no_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    with pytest.raises(errors.DaemonUnavailable, match="daemon is not running"):
        GpuSched(tmp_path / "s").status()


def test_a_path_too_long_for_a_socket_is_named() -> None:
    with pytest.raises(errors.DaemonUnavailable, match=r"/x+: AF_UNIX path too long"):
        GpuSched("/" + "x" * 200).status()


def test_the_environment_overrides_only_the_default_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUSCHED_SOCKET", raising=False)
    assert GpuSched().socket_path == "/tmp/gpusched.sock"
    monkeypatch.setenv("GPUSCHED_SOCKET", "")
    assert GpuSched().socket_path == "/tmp/gpusched.sock"
    monkeypatch.setenv("GPUSCHED_SOCKET", "/run/other.sock")
    assert GpuSched().socket_path == "/run/other.sock"
    assert GpuSched(tmp_path / "s").socket_path == str(tmp_path / "s")


# -- readiness ----------------------------------------------------------------------------------------


def test_wait_ready_returns_when_the_process_holds_vram(tmp_path: Path) -> None:
    answers = (
        status_of(),
        status_of(state="starting", mem_mb=0),
        status_of(state="active", mem_mb=0),
        status_of(state="active", mem_mb=3),
    )
    with ScriptedServer(tmp_path, statuses(*answers)) as server, GpuSched(server.path) as gs:
        assert gs.wait_ready("a", poll=0.01)["mem_mb"] == 3
        assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("process", "text"),
    [
        ({"state": "dead", "mem_mb": 0, "exit_code": 1}, r"dead .*\(exit code 1\); see: gpusched"),
        ({"state": "dead", "mem_mb": 9, "exit_signal": 9}, r"dead .*\(signal 9\)"),
        (
            {"state": "failed", "mem_mb": 9, "error": "restore failed"},
            r"failed .*\(restore failed\)",
        ),
        ({"state": "dead", "mem_mb": 0}, "dead before it was ready; see"),
        ({}, "killed before it was ready"),
    ],
)
def test_wait_ready_ends_at_once_when_the_process_never_will_be(
    process: dict[str, Any], text: str, tmp_path: Path
) -> None:
    answers = (status_of(state="starting", mem_mb=0), status_of(**process))
    with ScriptedServer(tmp_path, statuses(*answers)) as server, GpuSched(server.path) as gs:
        with pytest.raises(errors.ProcessExited, match=text):
            gs.wait_ready("a", poll=0.01)
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("process", "text"),
    [
        ({"state": "active", "mem_mb": 0}, r"a was not ready within 0\.05 s: it is active"),
        ({}, "there is no process of that name"),
    ],
)
def test_wait_ready_gives_up_after_its_time(
    process: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with (
        ScriptedServer(tmp_path, statuses(status_of(**process))) as server,
        GpuSched(server.path) as gs,
    ):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=text):
            gs.wait_ready("a", timeout=0.05)
        assert time.monotonic() - began < 1.5, "the poll of 2 s does not lengthen it"


def test_wait_ready_gives_up_on_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    with (
        ScriptedServer(tmp_path, lambda peer: list(peer.requests())) as server,
        GpuSched(server.path, timeout_s=0.1) as gs,
        pytest.raises(TimeoutError, match="not ready"),
    ):
        gs.wait_ready("a", timeout=0.05)


# -- the first users' client --------------------------------------------------------------------------


def test_the_original_client_understands_what_this_one_does(tmp_path: Path) -> None:
    frozen = {"name": "a", "duration_ms": 1, "tier": "ram", "mem_mb": 2}

    def script(peer: Peer) -> None:
        line = peer._file.readline()
        request = json.loads(line)
        assert "id" not in request
        if request["method"] == "kill":
            peer.send({"ok": False, "error": "no process a", "code": "not_found", "details": {}})
        else:
            peer.send({"ok": True, "result": STATUS if request["method"] == "status" else frozen})

    with ScriptedServer(tmp_path, script) as server:
        gs = original_sdk.GpuSched(server.path)
        assert gs.freeze("a") == frozen
        assert gs.gpu_free_mb() == 79500
        assert gs.wait_ready("a")["pid"] == 7
        with pytest.raises(RuntimeError, match=r"^no process a$"):
            gs.kill("a")
    with pytest.raises(ConnectionError, match="daemon is not running"):
        gs.status()
