"""Fork: running copies from one snapshot, for real, the original going on as it was."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from daemons import PrivateDaemon, request, wait_until
from disk_tier import (
    beats,
    killing_criu,
    log,
    require_beating,
    start_rich,
    wait_no_image,
)
from gpusched.mechanisms.clock import SystemClock
from gpusched.mechanisms.disk import DiskTier
from gpusched.mechanisms.sim.script import Script
from gpusched.ports import Identity, Revival, Woken
from live import digests, prove_contents, running
from workloads import Workload, done, entries, refused

pytestmark = [pytest.mark.criu, pytest.mark.root]


@pytest.fixture(scope="module")
def shared() -> Iterator[PrivateDaemon]:
    with running(gpus=2, vram="256M") as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: PrivateDaemon) -> Iterator[PrivateDaemon]:
    yield shared
    Script(shared.sim_dir).clear()
    for name in entries(shared):
        request(shared.socket, "kill", name=name, force=True)
    wait_no_image(shared)


def test_copies_are_alive_at_the_same_time_with_the_same_contents(daemon: PrivateDaemon) -> None:
    model = Workload.start(daemon, "model", "24M")
    model.require_contents()
    result = done(daemon, "fork", name="model", copies=3)
    assert (result["source"], result["copies"]) == ("model", ["model-1", "model-2", "model-3"])
    assert "without TCP or UDP to the outside" in result["note"]
    model.require("active")
    found = entries(daemon)
    assert {e["state"] for e in found.values()} == {"active"}
    assert {e["gpu"] for e in found.values()} == {0}
    assert len({e["pid"] for e in found.values()}) == 4
    assert done(daemon, "status")["gpus"][0]["mem_used_mb"] == 4 * 24
    for name in found:
        prove_contents(daemon, name)
        assert set(digests(daemon, name)) == {model.digest}
    model.require_log()
    # Each is a process like any other.
    done(daemon, "freeze", name="model-2")
    done(daemon, "thaw", name="model-2")
    done(daemon, "hibernate", name="model-3")
    done(daemon, "thaw", name="model-3")
    done(daemon, "kill", name="model-1")
    for name in ("model", "model-2", "model-3"):
        prove_contents(daemon, name)
    assert done(daemon, "fork", name="model", copies=1)["copies"] == ["model-1"]


def test_copies_go_to_other_gpus_by_turns(daemon: PrivateDaemon) -> None:
    Workload.start(daemon, "model", "16M")
    done(daemon, "fork", name="model", copies=3, gpus=[1, 0])
    gpus = {name: entry["gpu"] for name, entry in entries(daemon).items()}
    assert gpus == {"model": 0, "model-1": 1, "model-2": 0, "model-3": 1}
    for name in gpus:
        prove_contents(daemon, name)


def test_a_frozen_process_stays_frozen_and_its_copies_run(daemon: PrivateDaemon) -> None:
    model = Workload.start(daemon, "model", "16M")
    done(daemon, "freeze", name="model")
    done(daemon, "fork", name="model", copies=2)
    model.require("frozen")
    for name in ("model-1", "model-2"):
        prove_contents(daemon, name)
    done(daemon, "thaw", name="model")
    model.require_contents()


def test_eight_copies_at_once(daemon: PrivateDaemon) -> None:
    Workload.start(daemon, "model", "4M")
    began = time.monotonic()
    names = done(daemon, "fork", name="model", copies=8, gpus=[0, 1])["copies"]
    print(f"8 copies in {time.monotonic() - began:.1f} s")
    assert len(names) == 8
    for name in names:
        prove_contents(daemon, name)


@pytest.mark.parametrize("by_turns", [False, True])
def test_copies_come_back_side_by_side_unless_they_would_make_the_same_names(
    by_turns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most = list[str](), 0
    both = threading.Barrier(2)

    def wake(image_id: str, revival: Revival) -> Woken:
        nonlocal most
        at_work.append(revival.name)
        most = max(most, len(at_work))
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.1 if by_turns else 10)
        at_work.remove(revival.name)
        return Woken(main=Identity(pid=1, start_ticks=0, boot_id=""), pids={})

    tier: Any = DiskTier(
        *(cast("Any", None), SystemClock(), tmp_path, cast("Any", None), cast("Any", None)),
        cast("Any", None),
    )
    monkeypatch.setattr(tier, "_wake", wake)
    monkeypatch.setattr(tier, "_is_by_turns", lambda _: by_turns)

    async def fork() -> None:
        async with asyncio.TaskGroup() as group:
            for name in ("a", "b"):
                revival = Revival(
                    tree_id=name, name=name, log_path="", fresh_log=True, own_network=True
                )
                group.create_task(tier.wake("image", revival), name=name)

    asyncio.run(fork())
    tier.close()
    assert most == (1 if by_turns else 2)


def test_a_copy_has_a_network_and_a_log_of_its_own(daemon: PrivateDaemon) -> None:
    port = start_rich(daemon, "rich")
    require_beating(daemon, "rich")
    names = done(daemon, "fork", name="rich", copies=2)["copies"]
    require_beating(daemon, "rich")
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        assert connection.recv(10) == b"1000"
    own = Path("/proc/self/ns/net").stat().st_ino
    for name in names:
        first = min(beats(daemon, name), default=0)
        wait_until(lambda n=name: beats(daemon, n), within_s=15, what=f"{name} beats")  # type: ignore[misc]
        require_beating(daemon, name, since=first or beats(daemon, name)[0])
        entry = entries(daemon)[name]
        assert entry["own_network"] is True
        assert Path(f"/proc/{entry['pid']}/ns/net").stat().st_ino != own
        assert "went backwards" not in log(daemon, name)


def test_open_files_that_copies_would_share_are_named_and_need_force(daemon: PrivateDaemon) -> None:
    data = daemon.directory / "data"
    start_rich(daemon, "rich", str(data))
    require_beating(daemon, "rich")
    answer = refused(daemon, "unsupported", "fork", name="rich")
    assert str(data) in answer["error"] and "--force" in answer["error"]
    require_beating(daemon, "rich")
    assert len(done(daemon, "fork", name="rich", copies=1, force=True)["copies"]) == 1


def test_copies_that_do_not_fit_are_refused_before_anything_is_touched(
    daemon: PrivateDaemon,
) -> None:
    model = Workload.start(daemon, "model", "100M")
    before = len(model._digests())
    answer = refused(daemon, "insufficient_gpu_memory", "fork", name="model", copies=2)
    assert "model-1" in answer["error"]
    assert list(entries(daemon)) == ["model"]
    model.require("active")
    assert len(model._digests()) >= before
    done(daemon, "fork", name="model", copies=2, gpus=[0, 1])


def test_a_failed_fork_leaves_the_original_and_no_copy(daemon: PrivateDaemon) -> None:
    model = Workload.start(daemon, "model", "16M")
    with killing_criu(daemon, delay_s=0.02) as killer:
        answer = request(daemon.socket, "fork", name="model", copies=2, within_s=60)
    assert killer.hits and not answer["ok"], answer
    wait_until(lambda: list(entries(daemon)) == ["model"], within_s=10, what="no copy is left")
    model.require("active")
    model.require_contents()
    # A copy that cannot get its VRAM takes the others with it.
    script = Script(daemon.sim_dir)
    script.add("restore", skip=1, times=None, error="UNKNOWN")
    answer = request(daemon.socket, "fork", name="model", copies=2, within_s=60)
    script.clear()
    assert not answer["ok"] and answer["details"]["copies"] == [], answer
    assert list(entries(daemon)) == ["model"]
    model.require("active")
    model.require_contents()


def test_names_that_are_too_long_and_gpus_that_are_not_there(daemon: PrivateDaemon) -> None:
    name = "n" * 63
    done(daemon, "run", name=name, cmd=["sleep", "1000"])
    assert "64" in refused(daemon, "invalid_request", "fork", name=name)["error"]
    done(daemon, "run", name="model", cmd=["sleep", "1000"])
    refused(daemon, "invalid_request", "fork", name="model", gpus=[7])
    assert set(entries(daemon)) == {name, "model"}
