"""kill -9 at random instants of hibernate, wake and fork: of CRIU, the daemon, the init, or all; nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, request, wait_until
from disk_tier import again, ask_quietly, criu_at_work, images, killing_criu, wait_no_image
from gpusched.mechanisms.sim.script import Script
from live import prove_contents
from workloads import Workload, done, entries, refused

pytestmark = [pytest.mark.criu, pytest.mark.root]

#: Longer than any of the operations takes, and than CRIU works for one.
_LONGEST_S = 0.45
_CRIU_S = 0.1


def test_a_dump_that_is_killed_leaves_the_process_as_it_was(private_daemon: StartDaemon) -> None:
    daemon = private_daemon()
    model = Workload.start(daemon, "model", "24M")
    for before in ("active", "frozen"):
        if before == "frozen":
            done(daemon, "freeze", name="model")
        with killing_criu(daemon, delay_s=0.02) as killer:
            answer = refused(daemon, "criu_error", "hibernate", name="model")
        assert killer.hits and before in answer["error"]
        model.require(before)
        assert images(daemon) == [] and not criu_at_work(daemon)
    done(daemon, "thaw", name="model")
    model.require_contents()


def test_a_restore_that_is_killed_leaves_it_on_disk(private_daemon: StartDaemon) -> None:
    daemon = private_daemon()
    model = Workload.start(daemon, "model", "24M")
    done(daemon, "hibernate", name="model")
    delays_s = [0.0, 0.01, 0.02, 0.03]
    hits = 0
    answer: dict[str, Any] = {"ok": True}
    while answer["ok"]:  # on a busy machine it may be done by then
        with killing_criu(daemon, delays_s.pop()) as killer:
            answer = request(daemon.socket, "thaw", within_s=60.0, name="model")
        hits = killer.hits
        if answer["ok"]:
            model = again(model)
            done(daemon, "hibernate", name="model")
    assert answer["code"] == "criu_error", answer
    assert hits
    assert entries(daemon)["model"]["state"] == "hibernated"
    assert not list(daemon.sim_dir.glob("trees/*/procs/*"))
    done(daemon, "thaw", name="model")
    again(model).require("active")
    model.require_contents()


def test_an_init_that_is_killed_during_a_dump_takes_its_process_along_and_nothing_else(
    private_daemon: StartDaemon,
) -> None:
    """Its namespace ends with it: that is a death of the process, and no image is left of it."""
    daemon = private_daemon()
    Workload.start(daemon, "model", "24M")
    (tree,) = (daemon.state_dir / "trees").iterdir()
    init = json.loads((tree / "alive.lock").read_text())["pid"]

    def kill() -> None:
        wait_until(lambda: criu_at_work(daemon), within_s=10, what="CRIU works")
        os.kill(init, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answer = request(daemon.socket, "hibernate", name="model", within_s=60)
    killer.join()
    assert not answer["ok"], answer
    wait_until(lambda: entries(daemon)["model"]["state"] == "dead", within_s=10, what="it is dead")
    assert images(daemon) == []


def test_killed_at_random_instants_nothing_is_lost(private_daemon: StartDaemon, soak: bool) -> None:
    seed = int(os.environ.get("GPUSCHED_SEED", random.randrange(10**6)))
    print(f"GPUSCHED_SEED={seed}")
    rng = random.Random(seed)
    daemon = private_daemon(gpus=2, vram="256M")
    model = Workload.start(daemon, "model", "24M")
    hits = Counter[str]()
    wanted = 200 if soak else 10
    for number in range(3 * wanted):
        state = entries(daemon)["model"]["state"]
        method = rng.choice(_METHODS[state])
        fresh = ["init"] if method in ("thaw", "fork") else []
        victim = rng.choice(["daemon", "criu", "both", *fresh])
        delay_s = rng.random() * (_LONGEST_S if victim == "daemon" else _CRIU_S)
        hits[_strike(daemon, method, victim, delay_s)] += 1
        said = f"round {number}: {method}, {victim} after {delay_s:.3f} s"
        _require_whole(daemon, model, said)
        if hits.total() - hits[""] >= wanted:
            break
    print(f"{number + 1} rounds, killed: {dict(hits)}")
    assert hits.total() - hits[""] >= wanted
    assert not soak or all(hits[each] >= 5 for each in ("daemon", "criu", "both", "init")), hits
    _bring_on(daemon, model)
    model.require_log()
    wait_no_image(daemon)


_METHODS = {
    "active": ["hibernate", "hibernate", "fork"],
    "frozen": ["hibernate", "thaw", "fork"],
    "hibernated": ["thaw"],
}


def _strike(daemon: PrivateDaemon, method: str, victim: str, delay_s: float) -> str:
    """One operation, and one kill in the middle of it: ``delay_s`` after its begin, or after CRIU or an init has begun.

    Returns who was hit; CRIU or the init may have ended before.
    """
    hit = ""
    asked = threading.Thread(target=ask_quietly, args=(daemon, method), kwargs={"name": "model"})
    asked.start()
    is_at_work = {"daemon": lambda _: True, "init": _fresh_inits}.get(victim, criu_at_work)
    while asked.is_alive() and not is_at_work(daemon):
        time.sleep(0.002)
    time.sleep(delay_s)
    if victim in ("criu", "both"):
        for pid in criu_at_work(daemon):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit = "criu"
    if victim == "init":
        for pid in _fresh_inits(daemon):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit = "init"
    if victim in ("daemon", "both"):
        daemon.kill9()
        hit = "both" if hit else "daemon"
    asked.join()
    if not daemon.is_running:
        daemon.start()
    return hit


def _fresh_inits(daemon: PrivateDaemon) -> list[int]:
    """Inits whose processes are not there yet: what dies with one is only a copy of an image."""
    found = []
    for tree in (daemon.state_dir / "trees").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if not (tree / "started.json").exists():
                found.append(int(json.loads((tree / "alive.lock").read_text())["pid"]))
    return found


def _require_whole(daemon: PrivateDaemon, model: Workload, said: str) -> None:
    """The process is somewhere, whole; copies are all there or none; nothing works on in the dark."""
    found = entries(daemon)
    assert found["model"]["state"] in _METHODS, f"{said}: {found['model']}"
    copies = [name for name in found if name != "model"]
    assert len(copies) in (0, 2), (said, found)
    for name in copies:
        prove_contents(daemon, name)
        done(daemon, "kill", name=name)
    if found["model"]["state"] == "active":
        prove_contents(daemon, "model")
    if found["model"]["state"] == "hibernated":
        assert len(images(daemon)) == 1, said
    else:
        wait_no_image_but(daemon, found["model"]["state"], said)
    wait_until(lambda: not criu_at_work(daemon), within_s=5, what=f"no CRIU works on ({said})")


def wait_no_image_but(daemon: PrivateDaemon, state: str, said: str) -> None:
    """One that came from disk and could not thaw keeps its image; nobody else has any."""
    allowed = 1 if state == "frozen" else 0
    wait_until(
        lambda: len(images(daemon)) <= allowed, within_s=5, what=f"{said}: left {images(daemon)}"
    )


def _bring_on(daemon: PrivateDaemon, model: Workload) -> None:
    if entries(daemon)["model"]["state"] != "active":
        done(daemon, "thaw", name="model")
    again(model).require("active")
    model.require_contents()


@pytest.mark.parametrize(
    "where", ["pages", "core", "manifest", "truncated"], ids=lambda where: str(where)
)
def test_an_image_that_is_damaged_is_refused_and_kept(
    private_daemon: StartDaemon, where: str
) -> None:
    daemon = private_daemon()
    Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    (name,) = images(daemon)
    image = daemon.state_dir / "images" / name
    _damage(image, where)
    for method in ("verify_snapshot", "thaw"):
        answer = request(daemon.socket, method, name="model", within_s=60)
        assert not answer["ok"], (method, answer)
    assert entries(daemon)["model"]["state"] == "hibernated"
    assert images(daemon) == [name]
    assert not list(daemon.sim_dir.glob("trees/*/procs/*"))
    daemon.restart()
    assert entries(daemon)["model"]["state"] == "hibernated"
    assert images(daemon) == [name]


def _damage(image: Path, where: str) -> None:
    """Changes one file of the image's own. Kept libraries are hard links to the system's: never those."""
    files = [p for p in image.rglob("*") if p.is_file() and p.parent.name != "kept"]
    named = {"pages": "pages-", "core": "core-", "manifest": "manifest", "truncated": "pages-"}
    path = next(p for p in files if p.name.startswith(named[where]))
    assert path.stat().st_nlink == 1
    data = bytearray(path.read_bytes())
    if where == "truncated":
        path.write_bytes(data[: len(data) // 2])
        return
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_driver_that_dies_while_it_comes_back(private_daemon: StartDaemon) -> None:
    daemon = private_daemon()
    model = Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    script = Script(daemon.sim_dir)
    script.add("restore", when="middle", crash=True)
    answer: dict[str, Any] = request(daemon.socket, "thaw", name="model", within_s=60)
    script.clear()
    if not answer["ok"]:
        assert entries(daemon)["model"]["state"] in ("frozen", "hibernated"), answer
        done(daemon, "thaw", name="model")
    again(model).require("active")
    model.require_contents()
