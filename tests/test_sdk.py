"""The synchronous SDK against a scripted server: what is asked, what comes back, and what happens when it does not."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import gpusched
import original_sdk
from gpusched import GpuSched, _requests, errors
from gpusched.aio import AsyncGpuSched
from gpusched.protocol import codec
from gpusched.protocol.methods import METHODS
from scripted_server import Peer, ScriptedServer, answer_all

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 10.0

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
    off, on = [{"name": "a"}, {"name": "b"}], [{"name": "c"}]
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
    with pytest.raises(errors.DaemonUnavailable, match="/x+: AF_UNIX path too long"):
        GpuSched("/" + "x" * 200).status()


def test_a_daemon_whose_queue_stays_full_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_requests, "CONNECT_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first.connect(str(tmp_path / "s"))
        with pytest.raises(errors.DaemonUnavailable, match="took no connection within 0.1 s"):
            GpuSched(tmp_path / "s").status()


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first.connect(str(tmp_path / "s"))
        with ThreadPoolExecutor() as pool, GpuSched(tmp_path / "s") as gs:
            asking = pool.submit(gs.status)
            listener.accept()[0].close()
            with listener.accept()[0] as accepted:
                accepted.recv(4096)
                accepted.sendall(b'{"ok":true,"result":{"gpus":[]},"id":1}\n')
                assert asking.result(WAIT_S) == {"gpus": []}


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


# -- who listens --------------------------------------------------------------------------------------

SERVE_AS = """
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
print(data.decode())
"""

ASK_AS = """
import os, sys
from gpusched import client
os.setuid(int(sys.argv[2]))
try:
    client.GpuSched(sys.argv[1]).status()
    print("answered")
except RuntimeError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("server_uid", "client_uid", "trusted"),
    [(0, 65534, True), (65534, 65534, True), (65534, 0, False), (65533, 65534, False)],
)
def test_nothing_is_sent_to_a_server_that_is_neither_root_nor_oneself(
    server_uid: int, client_uid: int, trusted: bool, tmp_path: Path
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own is closed to others
        Path(directory).chmod(0o777)
        path = f"{directory}/s"
        with subprocess.Popen(
            [sys.executable, "-S", "-c", SERVE_AS, path, str(server_uid)],
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            said = run_python(ASK_AS, path, str(client_uid))
            received = server.stdout.read()

    if trusted:
        assert said == "answered\n"
        assert json.loads(received)["method"] == "status"
    else:
        assert said.startswith(f"PermissionDenied nothing was sent: the socket {path}")
        assert f"uid {server_uid}, neither root nor you (uid {client_uid})" in said
        assert received == "\n", "not one byte"


# -- bytes and connections ----------------------------------------------------------------------------


def test_a_response_may_arrive_in_any_pieces(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        for request in peer.requests():
            response = {"ok": True, "result": {"output": "é€\n"}, "id": request["id"]}
            line = json.dumps(response, ensure_ascii=False).encode() + b"\n"
            for cut in range(len(line)):
                peer.send_bytes(line[cut : cut + 1])

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        for _ in range(3):
            assert gs.call("logs") == {"output": "é€\n"}


def test_a_response_may_be_longer_than_any_request(tmp_path: Path) -> None:
    logs = {"name": "a", "lines": ["x" * 5_000_000], "output": ""}
    with (
        ScriptedServer(tmp_path, answer_all({"logs": logs})) as server,
        GpuSched(server.path) as gs,
    ):
        assert gs.logs("a", -1) == logs


def test_a_request_that_does_not_fit_the_sockets_buffer_arrives_whole(tmp_path: Path) -> None:
    command = ["x" * 100_000] * 9
    with ScriptedServer(tmp_path, answer_all({"run": {}})) as server, GpuSched(server.path) as gs:
        gs.run("a", command, env={})
    assert server.requests[0][1]["params"]["cmd"] == command


def test_one_connection_serves_many_requests(tmp_path: Path) -> None:
    with ScriptedServer(tmp_path, answer_all({"status": STATUS})) as server:
        with GpuSched(server.path) as gs:
            for _ in range(20):
                gs.status()
            assert repr(gs) == f"<GpuSched {server.path} [1 idle, 0 leases]>"
        assert server.connections == 1
        assert gs.status() == STATUS, "a closed client may be used again"
        gs.close()


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[1]\n",
        b'{"time":"now","type":"freeze"}\n',
        b'{"ok":true,"result":{},"id":999}\n',
        b'{"ok":"yes","result":{},"id":1}\n',
    ],
)
def test_what_is_no_answer_to_the_request_is_never_taken_for_one(
    line: bytes, tmp_path: Path
) -> None:
    def script(peer: Peer) -> None:
        for _ in peer.requests():
            if peer.number == 0:
                peer.send_bytes(line)
            else:
                peer.answer(STATUS)

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        with pytest.raises(errors.ProtocolMismatch):
            gs.status()
        assert gs.status() == STATUS
        assert server.connections == 2


def test_a_daemon_that_echoes_no_id_is_understood(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        for _ in peer.requests():
            peer.send({"ok": True, "result": "ok"})

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        assert gs.call("kill", name="a") == "ok"


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"subscribe"}))
def test_only_an_idempotent_request_is_sent_again_when_the_daemon_goes_away(
    method: str, tmp_path: Path
) -> None:
    def script(peer: Peer) -> None:
        for _ in peer.requests():
            if peer.number == 0:
                return
            peer.answer({})

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        if METHODS[method].idempotent:
            assert gs.call(method) == {}
            assert server.methods == [method, method]
        else:
            with pytest.raises(errors.DaemonUnavailable, match=f"'{method}'.*not known"):
                gs.call(method)
            assert server.methods == [method]


def test_a_daemon_that_always_goes_away_is_asked_twice_at_most(tmp_path: Path) -> None:
    with (
        ScriptedServer(tmp_path, lambda peer: peer.request() and None) as server,
        GpuSched(server.path) as gs,
    ):
        with pytest.raises(errors.DaemonUnavailable):
            gs.status()
        assert server.methods == ["status", "status"]


def test_a_daemon_that_ends_in_the_middle_of_its_answer_is_not_believed(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send_bytes(b'{"ok":true,"result":{"name":"a"},"id":1}')

    with (
        ScriptedServer(tmp_path, script) as server,
        GpuSched(server.path) as gs,
        pytest.raises(errors.DaemonUnavailable),
    ):
        gs.kill("a")


def test_a_connection_that_ended_while_idle_costs_nothing(tmp_path: Path) -> None:
    closed = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.answer({"name": "a"})
        if peer.number == 0:
            peer.close()
            closed.set()

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        gs.kill("a")
        assert closed.wait(WAIT_S)
        assert gs.kill("a") == {"name": "a"}, "not idempotent, but it was never sent twice"
        assert [number for number, _ in server.requests] == [0, 1]


def test_unasked_bytes_on_an_idle_connection_are_never_read_as_an_answer(tmp_path: Path) -> None:
    sent = threading.Event()

    def script(peer: Peer) -> None:
        for request in peer.requests():
            peer.answer({"connection": peer.number})
            peer.send({"ok": True, "result": "stray", "id": request["id"] + 1})
            sent.set()

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        assert gs.call("x") == {"connection": 0}
        assert sent.wait(WAIT_S)
        assert gs.call("x") == {"connection": 1}


def test_an_answer_that_is_late_is_given_up_and_never_mixed_up(tmp_path: Path) -> None:
    go = threading.Event()

    def script(peer: Peer) -> None:
        for request in peer.requests():
            if request["method"] == "freeze":
                assert go.wait(WAIT_S)
            peer.answer({"method": request["method"]})

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path, timeout_s=0.2) as gs:
        with pytest.raises(errors.DeadlineExceeded, match="'freeze' within 0.2 s"):
            gs.freeze("a")
        go.set()
        assert gs.call("thaw") == {"method": "thaw"}
        assert server.methods == ["freeze", "thaw"], "what was slow is not asked again"


def test_an_interrupted_call_leaves_the_client_usable(tmp_path: Path) -> None:
    go = threading.Event()

    def script(peer: Peer) -> None:
        for request in peer.requests():
            if request["method"] == "freeze":
                os.kill(os.getpid(), signal.SIGUSR1)
                assert go.wait(WAIT_S)
            peer.answer({"method": request["method"]})

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
            with pytest.raises(KeyboardInterrupt):
                gs.freeze("a")
            go.set()
            assert gs.call("thaw") == {"method": "thaw"}
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- threads and forks --------------------------------------------------------------------------------


def test_threads_share_a_client_and_get_their_own_answers(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        for request in peer.requests():
            peer.answer(request["params"])

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        with ThreadPoolExecutor(8) as pool:
            asked = range(400)
            assert list(pool.map(lambda n: gs.call("echo", n=n), asked)) == [
                {"n": n} for n in asked
            ]
        ids = [(number, request["id"]) for number, request in server.requests]
    assert len(set(ids)) == 400


def test_a_slow_freeze_does_not_hold_up_another_threads_status(tmp_path: Path) -> None:
    arrived, go = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        for request in peer.requests():
            if request["method"] == "freeze":
                arrived.set()
                assert go.wait(WAIT_S)
            peer.answer({"name": "a"} if request["method"] == "freeze" else STATUS)

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs, ThreadPoolExecutor() as pool:
        freezing = pool.submit(gs.freeze, "a")
        assert arrived.wait(WAIT_S)
        assert gs.status() == STATUS
        assert not freezing.done()
        go.set()
        assert freezing.result(WAIT_S) == {"name": "a"}


FORK = """
import os, sys
from gpusched import GpuSched

gs = GpuSched(sys.argv[1])
gs.call("parent")
with gs.on_gpu("a"):
    child = os.fork()
    if child == 0:
        gs.call("child")
        gs.close()
    else:
        assert os.waitpid(child, 0)[1] == 0
        gs.call("parent")
if child:
    gs.call("after")
    gs.close()
"""


def test_a_forked_child_opens_its_own_connection_and_leaves_the_parents_lease(
    tmp_path: Path,
) -> None:
    ended: list[int] = []

    def script(peer: Peer) -> None:
        for request in peer.requests():
            peer.answer({"lease_ended": 1 in ended, "method": request["method"]})
        ended.append(peer.number)

    with ScriptedServer(tmp_path, script) as server:
        run_python(FORK, server.path, flags=("-S",))
        asked = [(number, request["method"]) for number, request in server.requests]
    assert asked == [(0, "parent"), (1, "acquire"), (2, "child"), (0, "parent"), (0, "after")]
    assert ended == [2, 1, 0], "the lease outlived the child and ended before what came after it"


# -- readiness ----------------------------------------------------------------------------------------


def statuses(*answers: dict[str, Any]) -> Callable[[Peer], None]:
    """Answers each status with the next of ``answers``, the last one for ever."""
    left = list(answers)

    def script(peer: Peer) -> None:
        for _ in peer.requests():
            peer.answer(left.pop(0) if len(left) > 1 else left[0])

    return script


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
        ScriptedServer(tmp_path, lambda peer: list(peer.requests()) and None) as server,
        GpuSched(server.path, timeout_s=0.1) as gs,
        pytest.raises(TimeoutError, match="not ready"),
    ):
        gs.wait_ready("a", timeout=0.05)


# -- streams ------------------------------------------------------------------------------------------


def test_events_arrive_until_the_daemon_ends_the_stream(tmp_path: Path) -> None:
    sent = [{"time": "t", "type": "freeze", "process": "a"}, {"time": "t", "type": "thaw"}]

    def script(peer: Peer) -> None:
        request = peer.request()
        assert request is not None
        assert (request["method"], request["params"]) == ("subscribe", {})
        peer.answer(STATUS)
        for event in sent:
            peer.send(event)

    with (
        ScriptedServer(tmp_path, script) as server,
        GpuSched(server.path) as gs,
        gs.events() as events,
    ):
        assert events.first == STATUS
        assert list(events) == sent
        assert list(events) == []


def test_leaving_the_block_ends_the_subscription(tmp_path: Path) -> None:
    left = threading.Event()

    def script(peer: Peer) -> None:
        for _ in peer.requests():
            peer.answer(STATUS)
            peer.send({"type": "freeze"})
        left.set()

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        with gs.events() as events:
            assert next(events)["type"] == "freeze"
        assert left.wait(WAIT_S)


def test_a_dropped_stream_closes_its_socket(tmp_path: Path) -> None:
    left = threading.Event()

    def script(peer: Peer) -> None:
        for _ in peer.requests():
            peer.answer(STATUS)
            peer.send({"type": "freeze"})
        left.set()

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        for event in gs.events():
            assert event["type"] == "freeze"
            break
        assert left.wait(WAIT_S)


def test_close_from_another_thread_ends_a_waiting_stream(tmp_path: Path) -> None:
    with (
        ScriptedServer(tmp_path, answer_all({"subscribe": STATUS})) as server,
        GpuSched(server.path) as gs,
        ThreadPoolExecutor() as pool,
    ):
        events = gs.events()
        reading = pool.submit(list, events)
        events.close()
        assert reading.result(WAIT_S) == []


def test_followed_logs_are_the_last_lines_and_then_each_new_one(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        request = peer.request()
        assert request is not None
        assert request["params"] == {"name": "a", "lines": 2, "follow": True}
        peer.answer({"name": "a", "lines": ["1", "2"], "output": "1\n2"})
        peer.send({"line": "3"})
        peer.send({"line": ""})

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        assert list(gs.follow_logs("a", 2)) == ["1", "2", "3", ""]


def test_errors_open_and_end_a_stream_as_exceptions(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        for request in peer.requests():
            if request["method"] == "logs":
                peer.refuse("no such process", code="not_found")
            else:
                peer.answer(STATUS)
                peer.send({"ok": False, "error": "too slow", "code": "unavailable"})

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs:
        with pytest.raises(errors.NotFound, match="no such process"):
            gs.follow_logs("a")
        with gs.events() as events, pytest.raises(errors.Unavailable, match="too slow"):
            next(events)


# -- leases -------------------------------------------------------------------------------------------


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


@pytest.fixture
def book(tmp_path: Path) -> Iterator[tuple[LeaseBook, GpuSched]]:
    keeping = LeaseBook()
    with ScriptedServer(tmp_path, keeping) as server, GpuSched(server.path) as gs:
        yield keeping, gs


def test_a_lease_lasts_as_long_as_its_block(book: tuple[LeaseBook, GpuSched]) -> None:
    leases, gs = book
    with gs.on_gpu("a", "b", evict=True) as lease:
        assert list(leases.held.values()) == [["a", "b"]], "one connection for both"
        assert lease.acquired["a"] == {"name": "a", "from_tier": "ram"}
        assert lease.names == ("a", "b")
        with pytest.raises(errors.InvalidRequest, match="already held"):
            lease.__enter__()
    assert leases.held == {}, "the daemon knows when the block is left"
    with lease:
        assert list(leases.held.values()) == [["a", "b"]], "it may be taken again"


def test_a_lease_that_cannot_be_had_whole_is_not_had_at_all(
    book: tuple[LeaseBook, GpuSched],
) -> None:
    leases, gs = book
    with pytest.raises(errors.NotFound), gs.on_gpu("a", "gone"):
        pytest.fail("the block must not be entered")
    assert leases.held == {}


def test_a_lease_ends_when_its_block_raises(book: tuple[LeaseBook, GpuSched]) -> None:
    leases, gs = book
    with pytest.raises(ZeroDivisionError), gs.on_gpu("a"):
        raise ZeroDivisionError
    assert leases.held == {}


def test_an_acquired_process_is_held_until_it_is_released(
    book: tuple[LeaseBook, GpuSched],
) -> None:
    leases, gs = book
    gs.acquire("a")
    gs.acquire("b")
    gs.acquire("a")
    assert sorted(leases.held.values()) == [["a"], ["a"], ["b"]]
    with pytest.raises(errors.NotFound):
        gs.acquire("gone")
    assert gs.release("a") == {"name": "a", "released": 2}
    assert list(leases.held.values()) == [["b"]]
    gs.close()
    assert leases.held == {}


def test_a_lease_outlives_a_daemon_that_went_away_without_an_error(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.answer({"name": "a"})

    with ScriptedServer(tmp_path, script) as server, GpuSched(server.path) as gs, gs.on_gpu("a") as lease:
        assert lease.acquired["a"]["name"] == "a"


# -- what an import costs -----------------------------------------------------------------------------


def test_the_sdk_needs_the_standard_library_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import gpusched
first = set(sys.modules) - before
gpusched.GpuSched, gpusched.AsyncGpuSched, gpusched.errors, gpusched.types
assert set(gpusched.__all__) <= set(dir(gpusched)), dir(gpusched)
print(*sorted(first))
print(*sorted({name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names))
try:
    gpusched.nothing
except AttributeError as error:
    print(error)
"""
    first, foreign, missing = run_python(code, flags=("-S",)).splitlines()
    assert set(first.split()) <= {"__future__", "gpusched"}, "import gpusched loads nothing"
    assert set(foreign.split()) <= {"__main__", "gpusched"}
    assert missing == "module 'gpusched' has no attribute 'nothing'"


def test_the_synchronous_client_loads_no_slow_module() -> None:
    code = "import sys, gpusched; gpusched.GpuSched; print(*sys.modules)"
    loaded = run_python(code, flags=("-S",)).split()
    assert not {"asyncio", "dataclasses", "inspect", "pathlib", "subprocess", "msgspec"} & set(
        loaded
    )


def test_importing_takes_a_few_milliseconds() -> None:
    code = "import time; t = time.perf_counter(); import gpusched; print(time.perf_counter() - t)"
    times_s = [float(run_python(code, flags=("-S",))) for _ in range(5)]
    assert min(times_s) < 0.010


def test_the_version_is_that_of_the_package() -> None:
    assert gpusched.__version__.count(".") == 2


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
        with pytest.raises(RuntimeError, match="^no process a$"):
            gs.kill("a")
    with pytest.raises(ConnectionError, match="daemon is not running"):
        gs.status()
