"""To disk ahead of need: in the background, for nobody in particular, and out of everybody's way."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import StartDaemon
from daemons import ROOT, PrivateDaemon, request, wait_until
from disk_tier import again, criu_at_work, images
from workloads import Workload, done, entries

pytestmark = [pytest.mark.criu, pytest.mark.root]

#: Longer than anything else here takes: a dump in whose middle things can happen.
SLOW_S = 3


@pytest.fixture
def slow_criu(tmp_path: Path) -> dict[str, str]:
    """A CRIU that takes its time over dumps while a file is there, which it does before it touches anybody."""
    criu = tmp_path / "criu"
    slow = tmp_path / "slow"
    criu.write_text(
        f'#!/bin/sh\n[ "$1" = dump ] && [ -e {slow} ] && sleep {SLOW_S}\nexec {ROOT}/.criu/bin/criu "$@"\n'
    )
    criu.chmod(0o755)
    return {"GPUSCHED_CRIU": str(criu), "SLOW": str(slow)}


def start(private_daemon: StartDaemon, reserve: str, env: dict[str, str]) -> PrivateDaemon:
    """RAM for three of 24 MiB."""
    config = Path(env["SLOW"]).parent / "config.toml"
    config.write_text(f'ram_reserve = "{reserve}"\n')
    args = ["--config", str(config), "--ram-budget", "75M"]
    return private_daemon(vram="200M", args=args, env=env)


def states(daemon: PrivateDaemon) -> dict[str, str]:
    return {name: entry["state"] for name, entry in entries(daemon).items()}


def frozen(daemon: PrivateDaemon, *names: str) -> list[Workload]:
    """Started and frozen, the first one longest ago."""
    models = [Workload.start(daemon, name, "24M", seed=n) for n, name in enumerate(names)]
    for model in models:
        done(daemon, "freeze", name=model.name)
    return models


@pytest.mark.slow
def test_the_coldest_goes_by_itself_and_a_freeze_finds_its_room(
    private_daemon: StartDaemon, slow_criu: dict[str, str]
) -> None:
    daemon = start(private_daemon, "25M", slow_criu)
    models = frozen(daemon, "a", "b")
    time.sleep(2.5)
    assert states(daemon) == {"a": "frozen", "b": "frozen"}, "there is room for one more"
    models += frozen(daemon, "c")
    wait_until(lambda: states(daemon)["a"] == "hibernated", within_s=10, what="the coldest went")
    fourth = Workload.start(daemon, "d", "24M", seed=9)
    assert "to_disk" not in done(daemon, "freeze", name="d")
    wait_until(lambda: states(daemon)["b"] == "hibernated", within_s=10, what="and the next")
    for model in (*models, fourth):
        done(daemon, "thaw", name=model.name)
        again(model).require_contents()


def test_who_is_wanted_meanwhile_is_given_up_at_once(
    private_daemon: StartDaemon, slow_criu: dict[str, str]
) -> None:
    daemon = start(private_daemon, "50M", slow_criu)
    Path(slow_criu["SLOW"]).touch()
    (model, other) = frozen(daemon, "a", "b")
    wait_until(lambda: criu_at_work(daemon), within_s=10, what="it is being saved")
    assert entries(daemon)["a"]["state"] == "hibernating"
    began = time.monotonic()
    assert done(daemon, "thaw", name="a")["from_tier"] == "ram"
    assert time.monotonic() - began < SLOW_S - 1
    model.require("active")
    model.require_contents()
    assert images(daemon) == [] and not criu_at_work(daemon)
    done(daemon, "kill", name="a")
    other.require("frozen")


@pytest.mark.slow
def test_who_needs_the_room_waits_for_its_end_and_sends_nobody_else(
    private_daemon: StartDaemon, slow_criu: dict[str, str]
) -> None:
    daemon = start(private_daemon, "25M", slow_criu)
    Path(slow_criu["SLOW"]).touch()
    last = Workload.start(daemon, "d", "24M", seed=9)
    frozen(daemon, "a", "b", "c")
    wait_until(lambda: criu_at_work(daemon), within_s=10, what="one is being saved")
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(request, daemon.socket, "freeze", name="d", within_s=60)
        last.require_contents()  # it runs on meanwhile, and is asked about as ever
        answer = asked.result()
    assert answer["ok"], answer
    found = states(daemon)
    assert (found["a"], found["d"]) == ("hibernated", "frozen")
    assert found["b"] in ("frozen", "hibernating"), "perhaps the next one, after that"


@pytest.mark.slow
def test_who_cannot_go_is_tried_once_and_the_next_one_goes(
    private_daemon: StartDaemon, slow_criu: dict[str, str]
) -> None:
    daemon = start(private_daemon, "25M", slow_criu)
    script = f"(setsid sleep 1000 &); exec {sys.executable} -m gpusched.workload --vram 24M"
    done(daemon, "run", name="orphaned", cmd=["sh", "-c", script])
    wait_until(lambda: entries(daemon)["orphaned"]["mem_mb"] == 24, within_s=20, what="it has it")
    done(daemon, "freeze", name="orphaned")
    frozen(daemon, "b", "c")
    wait_until(lambda: states(daemon)["b"] == "hibernated", within_s=15, what="the next one went")
    done(daemon, "thaw", name="b")
    done(daemon, "freeze", name="b")
    wait_until(lambda: states(daemon)["c"] == "hibernated", within_s=15, what="and the next")
    assert states(daemon)["orphaned"] == "frozen"
    assert daemon.log_text().count("not to disk ahead of need process=orphaned") == 1


def test_a_daemon_that_ends_gives_it_up_first(
    private_daemon: StartDaemon, slow_criu: dict[str, str]
) -> None:
    daemon = start(private_daemon, "50M", slow_criu)
    Path(slow_criu["SLOW"]).touch()
    (model, other) = frozen(daemon, "a", "b")
    wait_until(lambda: criu_at_work(daemon), within_s=10, what="it is being saved")
    began = time.monotonic()
    daemon.stop()
    assert time.monotonic() - began < SLOW_S - 0.5
    assert images(daemon) == []
    Path(slow_criu["SLOW"]).unlink()
    daemon.start()
    for each in (model, other):
        done(daemon, "thaw", name=each.name)
        again(each).require_contents()
