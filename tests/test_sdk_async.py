"""The asyncio SDK against a scripted server: concurrency, cancelling, connections.

What both clients share (requests, errors, readiness) is tested in full in ``test_sdk.py`` and once more here.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gpusched import AsyncGpuSched, _requests, errors
from scripted_server import (
    STATUS,
    ForeignServer,
    Peer,
    ScriptedServer,
    answer_all,
    status_of,
    statuses,
)

WAIT_S = 10.0


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


# -- requests and results -----------------------------------------------------------------------------

CALLS: list[tuple[str, Callable[[AsyncGpuSched], Awaitable[Any]], dict[str, Any]]] = [
    (
        "run",
        lambda gs: gs.run("a", ["x"], 1, dir="/", env={}),
        {"name": "a", "cmd": ["x"], "gpu": 1, "dir": "/", "env": {}},
    ),
    ("adopt", lambda gs: gs.adopt(4, "a"), {"pid": 4, "name": "a"}),
    ("freeze", lambda gs: gs.freeze("a", force=True), {"name": "a", "force": True}),
    ("thaw", lambda gs: gs.thaw("a", evict=True), {"name": "a", "evict": True}),
    ("kill", lambda gs: gs.kill("a"), {"name": "a"}),
    ("hibernate", lambda gs: gs.hibernate("a"), {"name": "a"}),
    ("migrate", lambda gs: gs.migrate("a", gpus=[1]), {"name": "a", "gpus": [1]}),
    ("fork", lambda gs: gs.fork("a", 3), {"name": "a", "copies": 3}),
    ("acquire", lambda gs: gs.acquire("a", for_s=1.5), {"name": "a", "for_s": 1.5}),
    ("acquire", lambda gs: gs.acquire("a"), {"name": "a"}),
    ("status", lambda gs: gs.status(), {}),
    ("logs", lambda gs: gs.logs("a", 0), {"name": "a", "lines": 0}),
    ("anything", lambda gs: gs.call("anything", a=1, b=None), {"a": 1}),
]


@pytest.mark.parametrize(("method", "act", "params"), CALLS)
async def test_each_method_sends_its_request_and_returns_the_result(
    method: str,
    act: Callable[[AsyncGpuSched], Awaitable[Any]],
    params: dict[str, Any],
    tmp_path: Path,
) -> None:
    with ScriptedServer(tmp_path, answer_all({method: {"name": "a"}})) as server:
        async with AsyncGpuSched(server.path) as gs:
            assert await act(gs) == {"name": "a"}
        [(_, request)] = server.requests
    assert request == {"id": 1, "method": method, "params": params}


async def test_what_is_made_of_a_result_is_the_same_as_in_the_synchronous_client(
    tmp_path: Path,
) -> None:
    a: Any = {"name": "a"}
    b: Any = {"name": "b"}
    swapped = {"duration_ms": 5, "off": [a], "on": [b]}
    with ScriptedServer(tmp_path, answer_all({"swap": swapped, "status": STATUS})) as server:
        async with AsyncGpuSched(server.path) as gs:
            assert await gs.swap("a", "b") == (a, b)
            assert await gs.swap(["a"], ["b"]) == ([a], [b])
            assert await gs.processes() == STATUS["processes"]
            assert await gs.gpu_free_mb() == 79500
            with pytest.raises(errors.NotFound):
                await gs.gpu_free_mb(7)
            assert repr(gs) == f"<AsyncGpuSched {server.path} [1 idle, 0 leases]>"
        assert server.connections == 1


async def test_responses_in_pieces_and_of_any_length(tmp_path: Path) -> None:
    long = "é" * 3_000_000

    def script(peer: Peer) -> None:
        for request in peer.requests():
            if request["method"] == "short":
                line = json.dumps({"ok": True, "result": "é", "id": request["id"]}).encode() + b"\n"
                for cut in range(len(line)):
                    peer.send_bytes(line[cut : cut + 1])
            else:
                peer.answer(long)

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs:
            assert await gs.call("short") == "é"
            assert await gs.call("long") == long


async def test_a_request_that_does_not_fit_the_sockets_buffer_arrives_whole(tmp_path: Path) -> None:
    command = ["x" * 100_000] * 9
    with ScriptedServer(tmp_path, answer_all({"run": {}})) as server:
        async with AsyncGpuSched(server.path) as gs:
            await gs.run("a", command, env={})
    assert server.requests[0][1]["params"]["cmd"] == command


# -- errors -------------------------------------------------------------------------------------------


async def test_an_error_response_raises_the_class_of_its_code(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        for _ in peer.requests():
            peer.refuse("held", code="lease_held", details={"by": 3})

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs:
            for _ in range(2):
                with pytest.raises(errors.LeaseHeld, match="held") as caught:
                    await gs.freeze("a")
                assert caught.value.details == {"by": 3}
        assert server.connections == 1


async def test_without_a_daemon_the_error_says_how_to_start_it(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"daemon is not running.*sudo gpusched daemon"):
        await AsyncGpuSched(tmp_path / "none").status()


async def test_a_daemon_whose_queue_stays_full_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_requests, "CONNECT_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first.connect(str(tmp_path / "s"))
        with pytest.raises(errors.DaemonUnavailable, match="took no connection"):
            await AsyncGpuSched(tmp_path / "s").status()


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first.connect(str(tmp_path / "s"))
        async with AsyncGpuSched(tmp_path / "s") as gs, asyncio.TaskGroup() as group:
            asking = group.create_task(gs.status())
            await asyncio.sleep(0)
            listener.accept()[0].close()
            accepted = (await asyncio.to_thread(listener.accept))[0]
            with accepted:
                await asyncio.to_thread(accepted.recv, 4096)
                accepted.sendall(b'{"ok":true,"result":{"gpus":[]},"id":1}\n')
                assert (await asking)["gpus"] == []


@pytest.mark.root
async def test_nothing_is_sent_to_a_server_that_is_neither_root_nor_oneself() -> None:
    with ForeignServer(65534) as server:
        with pytest.raises(errors.PermissionDenied, match="uid 65534, neither root nor you"):
            await AsyncGpuSched(server.path).status()
        assert await asyncio.to_thread(server.received) == "", "not one byte was sent"


async def test_only_an_idempotent_request_is_sent_again_when_the_daemon_goes_away(
    tmp_path: Path,
) -> None:
    def script(peer: Peer) -> None:
        for _ in peer.requests():
            if peer.number in (0, 2):
                return
            peer.answer(STATUS)

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs:
            assert await gs.status() == STATUS
        async with AsyncGpuSched(server.path) as gs:
            with pytest.raises(errors.DaemonUnavailable, match=r"'run'.*not known"):
                await gs.run("a", ["x"])
        assert server.methods == ["status", "status", "run"]


async def test_a_connection_that_ended_while_idle_costs_nothing(tmp_path: Path) -> None:
    closed = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.answer({"name": "a"})
        peer.close()
        closed.set()

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs:
            await gs.kill("a")
            await reached(closed)
            await gs.kill("a")
        assert [number for number, _ in server.requests] == [0, 1]


# -- many tasks, cancelling ---------------------------------------------------------------------------


async def test_tasks_share_a_client_and_get_their_own_answers(tmp_path: Path) -> None:
    all_here = threading.Barrier(10, timeout=WAIT_S)

    def script(peer: Peer) -> None:
        for request in peer.requests():
            all_here.wait()
            peer.answer(request["params"])

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs:
            for _ in range(2):
                answers = await asyncio.gather(*(gs.call("echo", n=n) for n in range(10)))
                assert answers == [{"n": n} for n in range(10)]
                assert "[4 idle," in repr(gs)
        assert server.connections == 16, "four were kept and reused"


class SlowFreeze:
    """A script whose freezes wait until the test lets them go."""

    def __init__(self) -> None:
        self.arrived, self.go, self.left = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, peer: Peer) -> None:
        for request in peer.requests():
            if request["method"] == "freeze":
                self.arrived.set()
                assert self.go.wait(WAIT_S)
            peer.answer({"method": request["method"]})
        self.left.set()


async def test_a_slow_freeze_does_not_hold_up_a_status(tmp_path: Path) -> None:
    slow = SlowFreeze()
    with ScriptedServer(tmp_path, slow) as server:
        async with AsyncGpuSched(server.path) as gs, asyncio.TaskGroup() as group:
            freezing = group.create_task(gs.freeze("a"))
            await reached(slow.arrived)
            assert await gs.call("status") == {"method": "status"}
            assert not freezing.done()
            slow.go.set()
            assert dict(await freezing) == {"method": "freeze"}


async def test_a_cancelled_call_closes_its_connection_and_never_mixes_answers(
    tmp_path: Path,
) -> None:
    slow = SlowFreeze()
    with ScriptedServer(tmp_path, slow) as server:
        async with AsyncGpuSched(server.path) as gs:
            freezing = asyncio.ensure_future(gs.freeze("a"))
            await reached(slow.arrived)
            freezing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await freezing
            slow.go.set()
            assert await gs.call("thaw") == {"method": "thaw"}
            await reached(slow.left)
        assert server.connections == 2


async def test_an_answer_that_is_late_is_given_up(tmp_path: Path) -> None:
    slow = SlowFreeze()
    with ScriptedServer(tmp_path, slow) as server:
        async with AsyncGpuSched(server.path, timeout_s=0.1) as gs:
            with pytest.raises(errors.DeadlineExceeded, match="'freeze' within"):
                await gs.freeze("a")
            slow.go.set()
            assert await gs.call("thaw") == {"method": "thaw"}


def test_a_client_outlives_the_event_loop(tmp_path: Path) -> None:
    with ScriptedServer(tmp_path, answer_all({"status": STATUS})) as server:
        gs = AsyncGpuSched(server.path)
        for _ in range(3):
            assert asyncio.run(gs.status()) == STATUS
        asyncio.run(gs.close())
        assert server.connections == 1


# -- readiness ----------------------------------------------------------------------------------------


async def test_wait_ready(tmp_path: Path) -> None:
    answers = (
        status_of(),
        status_of(state="starting", mem_mb=0),
        status_of(state="active", mem_mb=3),
        status_of(),
        status_of(state="dead", mem_mb=0),
    )
    with ScriptedServer(tmp_path, statuses(*answers)) as server:
        async with AsyncGpuSched(server.path) as gs:
            assert (await gs.wait_ready("a", poll=0.01))["mem_mb"] == 3
            with pytest.raises(TimeoutError, match="there is no process"):
                await gs.wait_ready("b", timeout=0)
            with pytest.raises(errors.ProcessExited):
                await gs.wait_ready("a")
