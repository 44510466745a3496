"""The asyncio SDK's streams and leases, against a scripted server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpusched import AsyncGpuSched, errors
from scripted_server import (
    STATUS,
    LeaseBook,
    Peer,
    ScriptedServer,
    answer_all,
)

WAIT_S = 10.0


# -- streams ------------------------------------------------------------------------------------------


async def test_events_arrive_until_the_daemon_ends_the_stream(tmp_path: Path) -> None:
    sent = [{"type": "freeze"}, {"type": "thaw"}]

    def script(peer: Peer) -> None:
        peer.request()
        peer.answer(STATUS)
        for event in sent:
            peer.send(event)

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs:
            assert [event async for event in gs.events()] == sent
            async with gs.events() as events:
                assert events.first == STATUS
                assert [event async for event in events] == sent
                assert [event async for event in events] == []


async def test_followed_logs_are_the_last_lines_and_then_each_new_one(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        request = peer.request()
        assert request is not None
        assert request["params"] == {"name": "a", "lines": 2, "follow": True}
        peer.answer({"name": "a", "lines": ["1", "2"], "output": "1\n2"})
        peer.send({"line": "3"})
        peer.send({"ok": False, "error": "too slow", "code": "unavailable"})

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs, gs.follow_logs("a", 2) as lines:
            assert [await anext(lines) for _ in range(3)] == ["1", "2", "3"]
            with pytest.raises(errors.Unavailable):
                await anext(lines)


async def test_waiting_for_an_event_may_be_given_up_and_tried_again(tmp_path: Path) -> None:
    go = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.answer(STATUS)
        assert go.wait(WAIT_S)
        peer.send({"type": "freeze"})

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs, gs.events() as events:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(events), 0.02)
            go.set()
            assert (await anext(events))["type"] == "freeze"


async def test_close_from_another_task_ends_a_waiting_stream(tmp_path: Path) -> None:
    with ScriptedServer(tmp_path, answer_all({"subscribe": STATUS})) as server:
        async with AsyncGpuSched(server.path) as gs, asyncio.TaskGroup() as group:
            events = gs.events()
            async with events:
                reading = group.create_task(anext(events, None))
                await asyncio.sleep(0)
                assert not reading.done()
            async with asyncio.timeout(WAIT_S):
                assert await reading is None


async def test_a_subscription_that_is_refused_raises(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        for _ in peer.requests():
            peer.refuse("ending", code="shutting_down")

    with ScriptedServer(tmp_path, script) as server:
        async with AsyncGpuSched(server.path) as gs:
            with pytest.raises(errors.ShuttingDown):
                async for _ in gs.events():
                    pytest.fail("there is no event")


# -- leases -------------------------------------------------------------------------------------------


@pytest.fixture
async def book(tmp_path: Path) -> AsyncIterator[tuple[LeaseBook, AsyncGpuSched]]:
    keeping = LeaseBook()
    with ScriptedServer(tmp_path, keeping) as server:
        async with AsyncGpuSched(server.path) as gs:
            yield keeping, gs


async def test_a_lease_lasts_as_long_as_its_block(book: tuple[LeaseBook, AsyncGpuSched]) -> None:
    leases, gs = book
    async with gs.on_gpu("a", "b", evict=True) as lease:
        assert list(leases.held.values()) == [["a", "b"]]
        assert lease.acquired["b"]["from_tier"] == "ram"
        with pytest.raises(errors.InvalidRequest, match="already held"):
            await lease.__aenter__()
    assert leases.held == {}
    with pytest.raises(errors.NotFound):
        async with gs.on_gpu("a", "gone"):
            pytest.fail("the block must not be entered")
    assert leases.held == {}


async def test_an_acquired_process_is_held_until_it_is_released(
    book: tuple[LeaseBook, AsyncGpuSched],
) -> None:
    leases, gs = book
    await gs.acquire("a")
    await gs.acquire("b")
    await gs.acquire("a")
    assert sorted(leases.held.values()) == [["a"], ["a"], ["b"]]
    with pytest.raises(errors.NotFound):
        await gs.acquire("gone")
    assert await gs.release("a") == {"name": "a", "released": 2}
    assert list(leases.held.values()) == [["b"]]
    await gs.close()
    assert leases.held == {}


async def test_a_cancelled_block_ends_its_lease(book: tuple[LeaseBook, AsyncGpuSched]) -> None:
    leases, gs = book
    entered = asyncio.Event()

    async def work() -> None:
        async with gs.on_gpu("a"):
            entered.set()
            await asyncio.Event().wait()

    working = asyncio.ensure_future(work())
    await entered.wait()
    assert list(leases.held.values()) == [["a"]]
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert leases.held == {}
