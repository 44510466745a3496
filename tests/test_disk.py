"""The disk tier: hibernate and wake, for real, on simulated GPUs. What comes back is what went."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemons import PrivateDaemon, request, wait_until
from disk_tier import (
    again,
    beats,
    images,
    log,
    require_beating,
    start_rich,
    wait_no_image,
)
from gpusched.mechanisms import proc
from gpusched.mechanisms.sim.script import Script
from live import running
from workloads import Workload, done, entries, refused

pytestmark = [pytest.mark.criu, pytest.mark.root]


@pytest.fixture(scope="module")
def shared() -> Iterator[PrivateDaemon]:
    with running(gpus=2, vram="512M") as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: PrivateDaemon) -> Iterator[PrivateDaemon]:
    yield shared
    for name in entries(shared):
        request(shared.socket, "kill", name=name, force=True)
    wait_no_image(shared)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("before", ["active", "frozen"])
def test_a_process_goes_to_disk_and_comes_back_as_it_was(
    daemon: PrivateDaemon, before: str
) -> None:
    model = Workload.start(daemon, "model", "24M")
    model.require_contents()
    if before == "frozen":
        done(daemon, "freeze", name="model")
    pid = model.pid
    went = done(daemon, "hibernate", name="model")
    assert (went["name"], went["tier"], went["mem_mb"]) == ("model", "disk", 24)
    entry = entries(daemon)["model"]
    assert (entry["state"], entry["tier"], entry["pid"], entry["mem_mb"]) == (
        "hibernated",
        "disk",
        0,
        24,
    )
    assert ended(pid) and not list(daemon.sim_dir.glob("trees/*")), "its RAM and VRAM are free"
    status = done(daemon, "status")
    assert status["memory"]["disk_used_mb"] == went["disk_mb"] > 24
    assert status["memory"]["snapshots_mb"] == 0
    assert status["gpus"][0]["mem_used_mb"] == 0
    came = done(daemon, "thaw", name="model")
    assert (came["from_tier"], came["mem_mb"]) == ("disk", 24)
    again(model).require("active", gpu=0)
    model.require_contents()
    wait_no_image(daemon)
    assert done(daemon, "status")["memory"]["disk_used_mb"] == 0


def test_a_goal_that_is_reached_is_a_success(daemon: PrivateDaemon) -> None:
    Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    for method in ("hibernate", "freeze"):
        result = done(daemon, method, name="model")
        assert (result["duration_ms"], result["tier"]) == (0, "disk")


def test_twenty_cycles(daemon: PrivateDaemon) -> None:
    model = Workload.start(daemon, "model", "8M")
    for _ in range(20):
        done(daemon, "hibernate", name="model")
        done(daemon, "thaw", name="model")
    again(model).require("active")
    model.require_contents()
    entry = entries(daemon)["model"]
    assert int(Path(f"/proc/{entry['pid']}/oom_score_adj").read_text()) == 0


def test_what_is_hard_to_save_comes_back_and_its_log_is_whole(daemon: PrivateDaemon) -> None:
    port = start_rich(daemon, "rich", str(daemon.directory / "data"))
    require_beating(daemon, "rich")
    for _ in range(3):
        done(daemon, "hibernate", name="rich")
        count = len(beats(daemon, "rich"))
        time.sleep(0.3)
        assert len(beats(daemon, "rich")) == count
        done(daemon, "thaw", name="rich")
        require_beating(daemon, "rich")
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            assert connection.recv(10) == b"1000", "its pid inside, in the host's network"
    assert "Error" not in log(daemon, "rich")


def test_a_log_that_was_rotated_or_is_gone_is_made_anew(daemon: PrivateDaemon) -> None:
    start_rich(daemon, "rich")
    require_beating(daemon, "rich")
    path = daemon.log_dir / "rich.log"
    done(daemon, "hibernate", name="rich")
    path.rename(daemon.directory / "rotated")
    done(daemon, "thaw", name="rich")
    wait_until(lambda: beats(daemon, "rich"), within_s=15, what="it writes into a new log")
    assert path.stat().st_mode & 0o777 == 0o600
    old = [int(x.split()[1]) for x in (daemon.directory / "rotated").read_text().splitlines()]
    assert beats(daemon, "rich")[0] in (len(old), len(old) + 1)
    done(daemon, "hibernate", name="rich")
    path.unlink()
    path.symlink_to("/etc/passwd")
    answer = refused(daemon, "internal", "thaw", name="rich")
    assert "log" in answer["error"]
    assert entries(daemon)["rich"]["state"] == "hibernated"
    path.unlink()
    done(daemon, "thaw", name="rich")


def test_a_kill_takes_the_image_along(daemon: PrivateDaemon) -> None:
    Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    assert len(images(daemon)) == 1
    done(daemon, "kill", name="model")
    assert images(daemon) == []
    refused(daemon, "not_found", "thaw", name="model")


def test_a_hibernated_process_is_killed_frozen_swapped_and_migrated_as_any_other(
    daemon: PrivateDaemon,
) -> None:
    one = Workload.start(daemon, "one", "300M", seed=1)
    done(daemon, "hibernate", name="one")
    two = Workload.start(daemon, "two", "300M", seed=2)
    refused(daemon, "insufficient_gpu_memory", "thaw", name="one")
    result = done(daemon, "swap", off="two", on="one")
    assert [r["from_tier"] for r in result["on"]] == ["disk"]
    again(one).require("active")
    two.require("frozen")
    one.require_contents()
    done(daemon, "hibernate", name="one")
    moved = done(daemon, "migrate", name="one", gpu=1)
    assert (moved["from_gpu"], moved["to_gpu"]) == (0, 1)
    again(one).require("active", gpu=1)
    one.require_contents()


def test_a_restarted_daemon_still_has_what_is_on_disk(daemon: PrivateDaemon) -> None:
    model = Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    daemon.restart()
    assert entries(daemon)["model"]["state"] == "hibernated"
    assert done(daemon, "status")["memory"]["disk_used_mb"] > 0
    done(daemon, "thaw", name="model")
    again(model).require_contents()


def test_without_its_journal_a_daemon_goes_by_the_images(daemon: PrivateDaemon) -> None:
    model = Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    daemon.kill9()
    (daemon.state_dir / "journal").unlink()
    daemon.start()
    entry = entries(daemon)["model"]
    assert (entry["state"], entry["gpu"], entry["mem_mb"]) == ("hibernated", 0, 8)
    done(daemon, "thaw", name="model")
    again(model).require_contents()


def test_an_image_that_is_gone_is_said_so(daemon: PrivateDaemon) -> None:
    Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    shutil.rmtree(daemon.state_dir / "images" / images(daemon)[0])
    refused(daemon, "not_found", "thaw", name="model")
    daemon.restart()
    entry = entries(daemon)["model"]
    assert (entry["state"], "image is gone" in entry["error"]) == ("dead", True)


def test_what_is_not_in_its_own_namespaces_is_refused_with_the_reason(
    daemon: PrivateDaemon,
) -> None:
    done(daemon, "run", name="plain", cmd=["sleep", "100"], isolate=False)
    answer = refused(daemon, "unsupported", "hibernate", name="plain")
    assert "without namespaces of its own" in answer["error"]
    with subprocess.Popen(["sleep", "100"]) as stranger:
        try:
            done(daemon, "adopt", name="adopted", pid=stranger.pid)
            for method in ("hibernate", "fork"):
                answer = refused(daemon, "unsupported", method, name="adopted")
                assert "was adopted" in answer["error"]
            assert entries(daemon)["adopted"]["state"] == "active"
        finally:
            stranger.kill()


def test_a_process_that_ends_while_it_is_frozen_from_disk_is_its_image(
    daemon: PrivateDaemon,
) -> None:
    """The driver fails to bring the VRAM back and the copy in RAM is killed: the image is what there is."""
    from gpusched.mechanisms.sim.script import Script

    model = Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    script = Script(daemon.sim_dir)
    script.add("restore", times=None, error="UNKNOWN")
    answer = request(daemon.socket, "thaw", name="model", within_s=60)
    script.clear()
    assert not answer["ok"]
    entry = entries(daemon)["model"]
    assert entry["state"] == "frozen", "in RAM, and nothing is lost"
    assert len(images(daemon)) == 1, "the image stays until it runs"
    os.kill(entry["pid"], 9)
    wait_until(
        lambda: entries(daemon)["model"]["state"] == "hibernated", within_s=10, what="it is on disk"
    )
    done(daemon, "thaw", name="model")
    again(model).require("active")
    model.require_contents()


def test_a_tree_that_the_driver_gave_up_comes_from_its_image_again(daemon: PrivateDaemon) -> None:
    from gpusched.mechanisms.sim.script import Script

    model = Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    script = Script(daemon.sim_dir)
    script.add("restore", state="failed", error="UNKNOWN")
    answer = request(daemon.socket, "thaw", name="model", within_s=60)
    script.clear()
    assert not answer["ok"]
    assert entries(daemon)["model"]["state"] == "hibernated", answer
    done(daemon, "thaw", name="model")
    again(model).require_contents()


def test_a_descendant_that_hangs_on_the_init_alone_is_in_the_way(daemon: PrivateDaemon) -> None:
    """CRIU saves what is below the main process; an orphan would be lost, so nothing is touched."""
    script = "(setsid sleep 1000 &) ; exec sleep 1000"
    done(daemon, "run", name="orphaned", cmd=["sh", "-c", script])
    time.sleep(0.3)
    answer = refused(daemon, "unsupported", "hibernate", name="orphaned")
    assert "left its parents" in answer["error"]
    assert entries(daemon)["orphaned"]["state"] == "active"


def init_of(daemon: PrivateDaemon) -> int:
    (tree,) = (daemon.state_dir / "trees").iterdir()
    return int(json.loads((tree / "alive.lock").read_text())["pid"])


def test_what_loses_its_parents_while_the_tree_is_frozen_for_its_image_is_not_lost(
    daemon: PrivateDaemon,
) -> None:
    trigger, born = daemon.directory / "trigger", daemon.directory / "born"
    model = f"{sys.executable} -m gpusched.workload --vram 8M"
    wait = f"until [ -e {trigger} ]; do sleep 0.02; done"
    orphan = f"(setsid sh -c 'echo $$ >{born}.part; mv {born}.part {born}; exec sleep 987' &)"
    done(daemon, "run", name="tree", cmd=["sh", "-c", f"{model} & {wait}; {orphan}; wait"])
    wait_until(lambda: entries(daemon)["tree"]["mem_mb"] == 8, within_s=20, what="it has its VRAM")
    script = Script(daemon.sim_dir)
    script.add("checkpoint", delay_s=2)
    try:
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(request, daemon.socket, "hibernate", name="tree", within_s=60)
            freezing = ("freezing", "hibernating")
            wait_until(
                lambda: entries(daemon)["tree"]["state"] in freezing,
                within_s=10,
                what="it was judged",
            )
            trigger.touch()
            answer = asked.result()
    finally:
        script.clear()
    assert answer["code"] == "unsupported" and "has left its parents" in answer["error"], answer
    assert entries(daemon)["tree"]["state"] == "active" and images(daemon) == []
    inner = int(born.read_text())
    inners = [proc.inner_pid(pid) for pid in proc.scan().descendants([init_of(daemon)])]
    assert inner in inners, "it lives on"


def test_hibernate_all_before_a_reboot(daemon: PrivateDaemon) -> None:
    one, two = Workload.start(daemon, "one", "8M"), Workload.start(daemon, "two", "8M", seed=2)
    done(daemon, "run", name="plain", cmd=["sleep", "100"], isolate=False)
    command = [sys.executable, "-m", "gpusched", "-s", daemon.socket]
    ran = subprocess.run(
        [*command, "hibernate", "--all"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode != 0, "one could not go"
    assert ran.stdout.splitlines() == [
        "Hibernated one → disk [simulated]",
        "Hibernated two → disk [simulated]",
    ]
    assert "plain" in ran.stderr
    states = {name: entry["state"] for name, entry in entries(daemon).items()}
    assert states == {"one": "hibernated", "two": "hibernated", "plain": "active"}
    for model in (one, two):
        done(daemon, "thaw", name=model.name)
        again(model).require_contents()


def test_snapshots_are_listed_verified_and_deleted(daemon: PrivateDaemon) -> None:
    Workload.start(daemon, "model", "8M")
    refused(daemon, "not_found", "verify_snapshot", name="model")
    done(daemon, "hibernate", name="model")
    (found,) = done(daemon, "snapshots")["snapshots"]
    assert (found["name"], found["state"], found["mem_mb"]) == ("model", "hibernated", 8)
    assert found["size_mb"] > 8
    assert done(daemon, "verify_snapshot", name="model")["size_mb"] == found["size_mb"]
    answer = refused(daemon, "illegal_transition", "delete_snapshot", name="model")
    assert "gpusched kill model" in answer["error"]
    folder = daemon.state_dir / "images"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / found["image"]).stat().st_mode & 0o777 == 0o700


def test_a_start_in_namespaces_of_its_own_takes_less_than_fifty_ms_more(
    daemon: PrivateDaemon,
) -> None:
    took: dict[bool, list[float]] = {True: [], False: []}
    for number in range(40):
        isolate = number % 2 == 0
        began = time.perf_counter()
        done(daemon, "run", name="start", cmd=["sleep", "1000"], isolate=isolate)
        took[isolate].append((time.perf_counter() - began) * 1000)
        done(daemon, "kill", name="start", force=True)
    inside, outside = (statistics.median(took[isolate]) for isolate in (True, False))
    print(f"a start takes {inside:.0f} ms in namespaces of its own, {outside:.0f} ms without")
    assert inside - outside < 50
