"""The synchronous SDK's connections: who listens, bytes in pieces, reuse, threads, forks."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest

from gpusched import GpuSched, _requests, errors
from gpusched.protocol.methods import METHODS
from scripted_server import (
    STATUS,
    ForeignServer,
    Peer,
    ScriptedServer,
    answer_all,
    run_python,
)

WAIT_S = 10.0


# -- who listens --------------------------------------------------------------------------------------


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
    server_uid: int, client_uid: int, trusted: bool
) -> None:
    with ForeignServer(server_uid) as server:
        said = run_python(ASK_AS, server.path, str(client_uid))
        received = server.received()

    if trusted:
        assert said == "answered\n"
        assert json.loads(received)["method"] == "status"
    else:
        assert said.startswith(f"PermissionDenied nothing was sent: the socket {server.path}")
        assert f"uid {server_uid}, neither root nor you (uid {client_uid})" in said
        assert received == "", "not one byte"


def test_a_daemon_whose_queue_stays_full_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_requests, "CONNECT_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first.connect(str(tmp_path / "s"))
        with pytest.raises(errors.DaemonUnavailable, match=r"took no connection within 0\.1 s"):
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
                assert asking.result(WAIT_S)["gpus"] == []


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
        ScriptedServer(tmp_path, Peer.request) as server,
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
        with pytest.raises(errors.DeadlineExceeded, match=r"'freeze' within 0\.2 s"):
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

    with (
        ScriptedServer(tmp_path, script) as server,
        GpuSched(server.path) as gs,
        ThreadPoolExecutor() as pool,
    ):
        freezing = pool.submit(gs.freeze, "a")
        assert arrived.wait(WAIT_S)
        assert gs.status() == STATUS
        assert not freezing.done()
        go.set()
        assert freezing.result(WAIT_S)["name"] == "a"


FORK = """
import os, sys
from gpusched import GpuSched

gs = GpuSched(sys.argv[1])
gs.call("parent")
gs.acquire("b")
with gs.on_gpu("a"):
    child = os.fork()
    if child == 0:
        gs.call("child")
        gs.close()
    else:
        assert os.waitpid(child, 0)[1] == 0
        assert gs.call("parent") == []
if child:
    assert gs.call("after") == ["a"]
    assert gs.release("b") == {"name": "b", "released": 1}
    assert gs.call("after") == ["a", "b"]
    gs.close()
"""


def test_a_forked_child_opens_its_own_connection_and_leaves_the_parents_leases(
    tmp_path: Path,
) -> None:
    ended: list[str] = []

    def script(peer: Peer) -> None:
        name = ""
        for request in peer.requests():
            if request["method"] == "acquire":
                name = request["params"]["name"]
            released = {"name": "b", "released": 0}
            peer.answer(released if request["method"] == "release" else ended)
        ended.extend([name] if name else [])

    with ScriptedServer(tmp_path, script) as server:
        run_python(FORK, server.path, flags=("-S",))
        asked = [(number, request["method"]) for number, request in server.requests]
    assert asked == [
        (0, "parent"),
        (1, "acquire"),
        (2, "acquire"),
        (3, "child"),
        (0, "parent"),
        (0, "after"),
        (0, "release"),
        (0, "after"),
    ]
