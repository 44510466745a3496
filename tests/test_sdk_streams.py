"""The synchronous SDK's streams and leases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpusched import GpuSched, errors
from scripted_server import (
    STATUS,
    LeaseBook,
    Peer,
    ScriptedServer,
    answer_all,
)

WAIT_S = 10.0


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


@pytest.fixture
def book(tmp_path: Path) -> Iterator[tuple[LeaseBook, GpuSched]]:
    keeping = LeaseBook()
    with ScriptedServer(tmp_path, keeping) as server, GpuSched(server.path) as gs:
        yield keeping, gs


def test_a_lease_lasts_as_long_as_its_block(book: tuple[LeaseBook, GpuSched]) -> None:
    leases, gs = book
    with gs.on_gpu("a", "b", evict=True) as lease:
        assert list(leases.held.values()) == [["a", "b"]], "one connection for both"
        assert lease.acquired["a"]["from_tier"] == "ram"
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

    with (
        ScriptedServer(tmp_path, script) as server,
        GpuSched(server.path) as gs,
        gs.on_gpu("a") as lease,
    ):
        assert lease.acquired["a"]["name"] == "a"
