"""Every single step that can fail, does: afterwards the state is known and true, and the process lives where it could.

All on simulated GPUs whose driver fails as the test says. See also: ``test_recovery.py`` (the daemon itself dies).
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, request, wait_until
from gpusched import errors
from gpusched.domain.moves import Move, Outcome
from gpusched.engine import moves
from gpusched.engine.model import Tree
from gpusched.mechanisms import driver_client
from gpusched.mechanisms.clock import SystemClock
from gpusched.mechanisms.driver_client import DriverClient
from gpusched.mechanisms.sim.script import Script, When
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.ports import DriverState
from gpusched.units import MIB
from simulated_program import Program
from workloads import Workload, done, entries, refused

pytest_plugins = ["simulated_fixtures"]

#: Two GPUs on which one of the two workloads fits, and something small beside it.
VRAM, SIZE = "40M", "24M"


class Pair:
    """Two workloads for one GPU: ``a`` active there, ``b`` frozen."""

    def __init__(self, daemon: PrivateDaemon) -> None:
        self.daemon = daemon
        self.script = Script(daemon.sim_dir)
        self.a = Workload.start(daemon, "a", SIZE, seed=1)
        done(daemon, "freeze", name="a")
        self.b = Workload.start(daemon, "b", SIZE, seed=2)
        done(daemon, "swap", off="b", on="a")

    def require_as_before(self) -> None:
        self.a.require("active", gpu=0)
        self.b.require("frozen", gpu=0)

    def require_ordinary_life(self) -> None:
        """The next swap, thaw, freeze and migration are as good as any, and so are the contents."""
        done(self.daemon, "swap", off="a", on="b")
        self.a.require("frozen", gpu=0)
        self.b.require("active", gpu=0)
        done(self.daemon, "freeze", name="b")
        done(self.daemon, "thaw", name="a")
        self.require_as_before()
        self.a.require_contents()
        self.b.require_log()


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[Pair]]:
    """The one pair that the tests share, while it is in order."""
    pairs: list[Pair] = []
    yield pairs
    for pair in pairs:
        done(pair.daemon, "swap", off="a", on="b")
        pair.b.require_contents()
        pair.daemon.end()


@pytest.fixture
def pair(pairs: list[Pair]) -> Iterator[Pair]:
    """Two workloads in order; a test that fails leaves a fresh pair to the next one."""
    if not pairs:
        daemon = PrivateDaemon(gpus=2, vram=VRAM)
        daemon.start()
        pairs.append(Pair(daemon))
    yield pairs[0]
    pairs[0].script.clear()
    try:
        pairs[0].require_as_before()
        assert list(entries(pairs[0].daemon)) == ["a", "b"]
    except AssertionError:
        pairs.pop().daemon.end()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


# -- a driver call fails --------------------------------------------------------------------------

#: What is asked, with which driver calls of whom; then where everything is when it was done.
REQUESTS: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "freeze": ("freeze", {"name": "a"}, [("lock", "a"), ("checkpoint", "a")]),
    "thaw": ("thaw", {"name": "a"}, [("restore", "a"), ("unlock", "a")]),
    "swap": (
        "swap",
        {"off": "a", "on": "b"},
        [("lock", "a"), ("checkpoint", "a"), ("restore", "b"), ("unlock", "b")],
    ),
    "migrate": (
        "migrate",
        {"name": "a", "gpu": 1},
        [("lock", "a"), ("checkpoint", "a"), ("restore", "a"), ("unlock", "a")],
    ),
    "migrate frozen": (
        "migrate",
        {"name": "b", "gpu": 1},
        [("restore", "b"), ("unlock", "b")],
    ),
}
CASES = [
    (what, call, whose, when, how)
    for what, (_, _, calls) in REQUESTS.items()
    for call, whose in calls
    for when in ("before", "middle", "after")
    for how in ("error", "crash")
    if (call in ("checkpoint", "restore") or when != "middle")  # lock and unlock are done at once
    and (how == "error" or what == "swap")  # a swap makes every call that there is
]


@pytest.mark.parametrize(("what", "call", "whose", "when", "how"), CASES)
def test_one_failing_driver_call_undoes_the_whole_or_changes_nothing(
    pair: Pair, what: str, call: str, whose: str, when: When, how: str
) -> None:
    method, params, _ = REQUESTS[what]
    if what == "thaw":
        done(pair.daemon, "freeze", name="a")
    pid = {"a": pair.a, "b": pair.b}[whose].pid
    if how == "error":
        pair.script.add(call, pid=pid, when=when, error="UNKNOWN")
    else:
        pair.script.add(call, pid=pid, when=when, crash=True)
    answer = request(pair.daemon.socket, method, **params)
    assert pair.script.fired(call) == 1
    if when == "after":
        # It reported a failure and had done its work: the driver's state says so, and that is believed.
        assert answer["ok"], answer
        _back_to_the_start(pair, what)
        pair.require_as_before()
        pair.a.require_contents()
        return
    assert answer["code"] == ("driver_error" if how == "error" else "unavailable"), answer
    assert f"{method} failed and was rolled back" in answer["error"]
    assert ("UNKNOWN" if how == "error" else "helper") in answer["error"]
    for process in entries(pair.daemon).values():
        if process["name"] in params.values():
            assert f"{process['name']} is {process['state']}" in answer["error"]
    assert any("rolled_back" in entry for entry in answer["details"]["story"])
    if what == "thaw":
        pair.a.require("frozen", gpu=0)
        done(pair.daemon, "thaw", name="a")
    pair.require_as_before()
    pair.require_ordinary_life()


def _back_to_the_start(pair: Pair, what: str) -> None:
    """From where a successful request leads; checked on the way."""
    match what:
        case "thaw":
            pass
        case "freeze":
            pair.a.require("frozen", gpu=0)
            done(pair.daemon, "thaw", name="a")
        case "swap":
            pair.a.require("frozen", gpu=0)
            pair.b.require("active", gpu=0)
            done(pair.daemon, "swap", off="b", on="a")
        case "migrate":
            pair.a.require("active", gpu=1)
            done(pair.daemon, "migrate", name="a", gpu=0)
        case "migrate frozen":
            pair.b.require("active", gpu=1)
            done(pair.daemon, "freeze", name="a")
            done(pair.daemon, "migrate", name="b", gpu=0)
            done(pair.daemon, "swap", off="b", on="a")
        case _:
            raise AssertionError(what)


def test_a_lock_that_times_out_leaves_the_process_running(pair: Pair) -> None:
    pair.script.add("lock", pid=pair.a.pid, error="LOCK_TIMEOUT")
    answer = refused(pair.daemon, "lock_timeout", "freeze", name="a")
    assert answer["retryable"]
    assert "rolled back (now a is active)" in answer["error"]
    pair.require_as_before()
    pair.require_ordinary_life()


def test_an_undo_that_fails_at_first_is_tried_again(pair: Pair) -> None:
    pair.script.add("checkpoint", pid=pair.a.pid, error="UNKNOWN")
    pair.script.add("unlock", pid=pair.a.pid, error="UNKNOWN", times=2)
    refused(pair.daemon, "driver_error", "freeze", name="a")
    assert pair.script.fired("unlock") == 2
    pair.require_as_before()
    pair.require_ordinary_life()


def test_what_cannot_be_taken_back_is_said_and_can_be_tried_again(pair: Pair) -> None:
    """A swap whose second half fails, and whose first half does not come back either: both copies are in RAM."""
    pair.script.add("restore", error="OUT_OF_MEMORY", times=None)
    answer = refused(pair.daemon, "process_lost", "swap", off="a", on="b")
    assert "swap failed and could not be taken back" in answer["error"]
    assert "a is frozen, b is frozen" in answer["error"]
    assert answer["details"]["cause_code"] == "driver_error"
    pair.a.require("frozen")
    pair.b.require("frozen")
    pair.script.clear()
    done(pair.daemon, "thaw", name="a")
    pair.require_as_before()
    pair.require_ordinary_life()


def test_a_process_that_stays_locked_is_failed_and_can_be_tried_again(pair: Pair) -> None:
    pair.script.add("checkpoint", pid=pair.a.pid, error="UNKNOWN", times=None)
    pair.script.add("unlock", pid=pair.a.pid, error="UNKNOWN", times=None)
    answer = refused(pair.daemon, "process_lost", "freeze", name="a")
    assert "gpusched kill a" in answer["error"]
    assert pair.a.entry["state"] == "failed"
    assert "taking it back failed too" in pair.a.entry["error"]
    pair.script.clear()
    done(pair.daemon, "thaw", name="a")
    assert pair.a.entry["error"] is None
    pair.require_as_before()
    pair.require_ordinary_life()


# -- the driver's helper dies or hangs ------------------------------------------------------------


def test_looking_at_the_gpus_survives_a_helper_that_crashes(pair: Pair) -> None:
    pair.script.add("usage", crash=True)
    refused(pair.daemon, "unavailable", "freeze", name="a")
    pair.require_as_before()
    pair.require_ordinary_life()


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
async def test_a_hung_driver_call_is_given_up_and_taken_back(
    pair: Pair, call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a helper and a mover of the test's own, whose deadlines are short."""
    monkeypatch.setattr("gpusched.engine.steps.deadline_for", lambda _: 0.5)
    for name in ("LOCK_MARGIN_S", "UNLOCK_DEADLINE_S"):
        monkeypatch.setattr(f"gpusched.mechanisms.driver_client.{name}", 0.5)
    move = Move.FREEZE if call in ("lock", "checkpoint") else Move.THAW
    target = pair.a if move is Move.FREEZE else pair.b
    if move is Move.THAW:
        done(pair.daemon, "freeze", name="a")
    trees = TreeKeeper(tmp_path)
    tree = Tree(tree_id="t", main=await trees.identify(target.pid), vram={}, oom_scores={})
    async with asyncio.TaskGroup() as tasks:
        options = ["--backend", "sim", "--sim-dir", str(pair.daemon.sim_dir)]
        driver = DriverClient(options, tasks)
        await driver.describe()
        pair.script.add(call, pid=target.pid, hang=True)
        mover = moves.Mover(driver, trees, SystemClock(), 0.5)
        report = await mover.run(tree, move)
        members = await trees.members("t", tree.main)
        states = await driver.states([target.pid])
        driver.close()
    trees.close()
    assert report.outcome is Outcome.ROLLED_BACK, report
    assert isinstance(report.error, errors.DeadlineExceeded)
    assert f"did not finish {call} of pid {target.pid}" in report.error.message
    wanted = DriverState.RUNNING if move is Move.FREEZE else DriverState.CHECKPOINTED
    assert states == {target.pid: wanted}
    assert [m.stopped for m in members] == [move is Move.THAW]
    if move is Move.THAW:
        done(pair.daemon, "thaw", name="a")
    pair.require_as_before()
    pair.require_ordinary_life()


def test_a_hung_driver_does_not_keep_the_daemon_from_ending(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram=VRAM)
    script = Script(daemon.sim_dir)
    script.add("usage", hang=True)
    wait_until(
        lambda: request(daemon.socket, "status") and script.fired("usage"),
        within_s=5,
        what="a call hangs",
    )
    assert daemon.stop() == 0
    script.clear()


async def test_a_helper_that_talks_nonsense_is_ended_and_its_calls_fail() -> None:
    """A library that prints, say; nothing after that can be trusted to be an answer."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import time; print('chatter', flush=True); time.sleep(60)"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    helper = driver_client._Helper(process)
    call: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    helper.waiting[1] = call
    async with asyncio.timeout(10):
        await helper.read_answers()
    assert process.returncode == -signal.SIGKILL
    assert helper.retired
    with pytest.raises(errors.Unavailable, match="ended in the middle of a call"):
        await call


def test_a_driver_that_prints_does_not_disturb_the_answers() -> None:
    code = """
import os
from gpusched.mechanisms import driver_host
class Chatty:
    def states(self, pids):
        os.write(1, b"chatter")
        return {pid: "none" for pid in pids}
driver_host.open_driver = lambda options: Chatty()
driver_host.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "--backend", "sim"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as host:
        assert host.stdin is not None
        assert host.stdout is not None
        assert host.stderr is not None
        host.stdin.write(b'{"id": 7, "call": "states", "args": {"pids": [1]}}\n')
        host.stdin.flush()
        assert json.loads(host.stdout.readline()) == {"id": 7, "result": {"1": "none"}}
        assert host.stderr.read(7) == b"chatter"
        host.stdin.close()
        assert host.wait(10) == 0


def test_a_daemon_without_descriptors_refuses_and_goes_on(pair: Pair) -> None:
    """An error that no part foresaw, in the middle of an operation: that one ends, the daemon does not."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(pair.daemon.socket)
        lines = connection.makefile("rwb")

        def ask(method: str, **params: Any) -> dict[str, Any]:
            lines.write(json.dumps({"method": method, "params": params}).encode() + b"\n")
            lines.flush()
            answer: dict[str, Any] = json.loads(lines.readline())
            return answer

        assert ask("status")["ok"]
        before = resource.prlimit(pair.daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pair.daemon.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        answers = [ask("freeze", name="a"), ask("swap", off="a", on="b"), ask("status")]
        resource.prlimit(pair.daemon.pid, resource.RLIMIT_NOFILE, before)
        assert {a["code"] for a in answers} == {"internal"}
        assert all("Too many open files" in a["error"] for a in answers), answers
        lines.close()
    pair.require_as_before()
    pair.require_ordinary_life()


# -- no room --------------------------------------------------------------------------------------


def test_a_stranger_who_took_the_vram_is_named_in_numbers_and_nothing_is_touched(
    pair: Pair,
) -> None:
    done(pair.daemon, "freeze", name="a")
    stranger = Program(pair.daemon.sim_dir, "0")
    try:
        assert stranger.tell("alloc", 20 * MIB) == 0
        pair.script.add("restore", times=None)  # counts, no more
        answer = refused(pair.daemon, "insufficient_gpu_memory", "thaw", name="a")
        assert "a needs 24 MiB on GPU 0; 20 MiB would be free" in answer["error"]
        (short,) = answer["details"]["gpus"]
        assert (short["need_bytes"], short["free_bytes"]) == (24 * MIB, 20 * MIB)
        refused(pair.daemon, "insufficient_gpu_memory", "thaw", name="a", evict=True)
        assert pair.script.fired("restore") == 0
        pair.a.require("frozen")
    finally:
        stranger.end()
    done(pair.daemon, "thaw", name="a")
    pair.require_as_before()
    pair.require_ordinary_life()


#: Takes VRAM the moment there is some, and says so.
GRABBER = """
import sys, time
from gpusched.mechanisms.sim import device
session = device.init()
print("waits", flush=True)
while True:
    try:
        buffer = session.allocate(int(sys.argv[1]))
        break
    except device.OutOfMemory:
        time.sleep(0.0005)
print("has it", flush=True)
sys.stdin.read()
"""


def test_a_stranger_who_is_quicker_than_a_swap_costs_nothing_but_time(pair: Pair) -> None:
    """Between the two halves the VRAM goes to somebody else. A restore that would not fit is never tried."""
    env = {"GPUSCHED_SIM_DIR": str(pair.daemon.sim_dir), "CUDA_VISIBLE_DEVICES": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", GRABBER, str(20 * MIB)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "waits\n"
        # Room for the stranger comes with the checkpoint; the daemon hears of that only later.
        pair.script.add("checkpoint", pid=pair.a.pid, when="after", delay_s=0.3)
        pair.script.add("restore", times=None)
        answer = refused(pair.daemon, "process_lost", "swap", off="a", on="b")
        assert stranger.stdout.readline() == "has it\n"
        assert answer["details"]["cause_code"] == "insufficient_gpu_memory"
        assert "24 MiB" in answer["error"]
        assert "20 MiB" in answer["error"]
        assert pair.script.fired("restore") == 0
        pair.a.require("frozen")
        pair.b.require("frozen")
        stranger.kill()
    done(pair.daemon, "thaw", name="a")
    pair.require_as_before()
    pair.require_ordinary_life()


@pytest.mark.parametrize("budget", ["0", "16M"])
def test_without_host_ram_a_freeze_is_refused_and_nothing_is_touched(
    private_daemon: StartDaemon, budget: str
) -> None:
    daemon = private_daemon(vram=VRAM, args=["--ram-budget", budget])
    workload = Workload.start(daemon, "a", SIZE)
    script = Script(daemon.sim_dir)
    script.add("lock", times=None)
    answer = refused(daemon, "insufficient_host_memory", "freeze", name="a")
    assert "a needs 24 MiB" in answer["error"]
    assert "--ram-budget" in answer["error"]
    assert answer["details"]["need_bytes"] == 24 * MIB
    assert script.fired("lock") == 0
    workload.require("active")
    workload.require_contents()
    # What needs no host RAM is frozen all the same.
    done(daemon, "run", name="idle", cmd=["sleep", "60"])
    done(daemon, "freeze", name="idle")
    assert entries(daemon)["idle"]["state"] == "frozen"
    done(daemon, "thaw", name="idle")


# -- targets that die, or do not stay the same ------------------------------------------------------


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_target_that_dies_in_the_middle_is_dead_and_nothing_else_is_touched(
    pair: Pair, pool: ThreadPoolExecutor, call: str, when: When
) -> None:
    daemon = pair.daemon
    if call in ("lock", "checkpoint"):
        mortal = Workload.start(daemon, "mortal", "8M", seed=3)
        method = "freeze"
    else:
        mortal = Workload.start(daemon, "mortal", "8M", seed=3)
        done(daemon, "freeze", name="mortal")
        method = "thaw"
    pair.script.add(call, pid=mortal.pid, when=when, delay_s=0.2)
    asked: Future[dict[str, Any]] = pool.submit(request, daemon.socket, method, name="mortal")
    wait_until(lambda: pair.script.fired(call), within_s=10, what=f"{call} is under way")
    os.kill(mortal.pid, signal.SIGKILL)
    answer = asked.result(30)
    assert answer["code"] == "process_exited", answer
    assert "mortal is dead" in answer["error"]
    entry = mortal.entry
    assert (entry["state"], entry["exit_signal"], entry["op"]) == ("dead", 9, None)
    assert mortal.log.read_text().startswith("ready digest=")
    refused(daemon, "process_exited", method, name="mortal")
    done(daemon, "kill", name="mortal")
    pair.require_as_before()
    pair.require_ordinary_life()


@pytest.mark.parametrize("victim", ["off", "on"])
def test_a_swap_whose_one_side_dies_leaves_the_other_where_it_was(
    pair: Pair, pool: ThreadPoolExecutor, victim: str
) -> None:
    """The off side dies while it is frozen; the on side while it still waits for its turn."""
    daemon = pair.daemon
    done(daemon, "freeze", name="a")
    mortal = Workload.start(daemon, "mortal", SIZE, seed=3)
    if victim == "on":
        done(daemon, "swap", off="mortal", on="a")
    off, on = ("mortal", "a") if victim == "off" else ("a", "mortal")
    off_pid = mortal.pid if victim == "off" else pair.a.pid
    pair.script.add("checkpoint", pid=off_pid, delay_s=0.3)
    asked = pool.submit(request, daemon.socket, "swap", off=off, on=on)
    wait_until(lambda: pair.script.fired("checkpoint"), within_s=10, what="the swap is under way")
    os.kill(mortal.pid, signal.SIGKILL)
    answer = asked.result(30)
    assert answer["code"] == "process_exited", answer
    assert "mortal is dead" in answer["error"]
    assert mortal.entry["state"] == "dead"
    if victim == "off":
        pair.a.require("frozen")
        done(daemon, "thaw", name="a")
    done(daemon, "kill", name="mortal")
    pair.require_as_before()
    pair.require_ordinary_life()


def test_a_swap_that_is_taken_back_passes_over_what_died_meanwhile(
    pair: Pair, pool: ThreadPoolExecutor
) -> None:
    """Two go off, one of them dies frozen, the other side fails: the one that lives comes back."""
    daemon = pair.daemon
    mortal = Workload.start(daemon, "mortal", "8M", seed=3)
    pair.script.add("restore", pid=pair.b.pid, delay_s=0.3, error="UNKNOWN")
    asked = pool.submit(request, daemon.socket, "swap", off=["a", "mortal"], on="b")
    wait_until(lambda: pair.script.fired("restore"), within_s=10, what="the second half")
    os.kill(mortal.pid, signal.SIGKILL)
    answer = asked.result(30)
    assert answer["code"] == "driver_error", answer
    assert "rolled back" in answer["error"]
    assert "mortal is dead" in answer["error"]
    done(daemon, "kill", name="mortal")
    pair.require_as_before()
    pair.require_ordinary_life()


def test_a_pid_that_has_just_vanished_is_an_exit_and_no_more(pair: Pair) -> None:
    for _ in range(5):
        pid = done(pair.daemon, "run", name="brief", cmd=["sleep", "60"])["pid"]
        os.kill(pid, signal.SIGKILL)
        refused(pair.daemon, "process_exited", "freeze", name="brief")
        wait_until(
            lambda: entries(pair.daemon)["brief"]["state"] == "dead",
            within_s=5,
            what="the exit is known",
        )
        assert entries(pair.daemon)["brief"]["exit_signal"] == 9
        done(pair.daemon, "kill", name="brief")
    pair.require_as_before()


#: Starts CUDA children without pause; each fills its memory, holds it for a while and checks it.
FORKER = """
import subprocess, sys, time
CHILD = '''
import os, time, zlib
from gpusched.mechanisms.sim import device
buffer = device.init().allocate(1 << 20)
pattern = os.urandom(4096) * 256
buffer.write(0, pattern)
end = time.monotonic() + 0.15
while time.monotonic() < end:
    assert buffer.read(0, 1 << 20) == pattern
    time.sleep(0.01)
'''
good, running = 0, []
while True:
    running.append(subprocess.Popen([sys.executable, "-c", CHILD]))
    time.sleep(0.03)
    ended = [c for c in running if c.poll() is not None]
    running = [c for c in running if c.poll() is None]
    for child in ended:
        assert child.returncode == 0, child.returncode
        good += 1
        print("good", good, flush=True)
"""


def test_a_tree_that_starts_cuda_children_all_the_time_is_frozen_whole(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(vram="256M")
    pid = done(daemon, "run", name="forker", cmd=[sys.executable, "-c", FORKER])["pid"]
    log = daemon.log_dir / "forker.log"

    def good() -> int:
        return log.read_text().count("good")

    for _ in range(4):
        before = good()
        wait_until(lambda before=before: good() > before + 3, within_s=30, what="children end well")  # type: ignore[misc]
        done(daemon, "freeze", name="forker")
        frozen = _tree_states(pid)
        assert len(frozen) > 1
        # D: one that waits in vfork for a child which is stopped.
        assert {"T"} <= set(frozen.values()) <= {"T", "D"}, frozen
        status = request(daemon.socket, "status")["result"]
        assert status["gpus"][0]["mem_used_mb"] == 0
        done(daemon, "thaw", name="forker")
        assert Path(f"/proc/{pid}").exists()
    before = good()
    wait_until(lambda: good() > before + 3, within_s=30, what="children end well")
    assert "Error" not in log.read_text()
    assert entries(daemon)["forker"]["state"] == "active"


def _tree_states(root: int) -> dict[int, str]:
    """The state letter of a process and all its descendants, zombies left out."""
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if letter != "Z":
            found[pid] = letter
            todo += [int(child) for child in children]
    return found


# -- the journal's disk is full ---------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[PrivateDaemon]:
    """A daemon whose state directory is a file system of 256 KiB."""
    daemon = PrivateDaemon(gpus=1, vram=VRAM)
    daemon.state_dir.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(daemon.state_dir)]
    subprocess.run(mount, check=True)
    try:
        daemon.start()
        yield daemon
        (daemon.state_dir / "filler").unlink(missing_ok=True)
        daemon.end()
    finally:
        daemon.kill9()
        subprocess.run(["umount", "--lazy", str(daemon.state_dir)], check=True)
        daemon.end()


def fill(daemon: PrivateDaemon) -> None:
    """Takes every block, and what is left of the journal's last one."""
    with (daemon.state_dir / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def fail_until_full(daemon: PrivateDaemon, name: str) -> dict[str, Any]:
    """Freezes and thaws ``name`` until the journal has no room; returns that error."""
    fill(daemon)
    for _ in range(50):
        for method in ("freeze", "thaw"):
            answer = request(daemon.socket, method, name=name)
            if not answer["ok"]:
                return answer
    raise AssertionError("the disk never filled up")


@pytest.mark.root
def test_on_a_full_disk_nothing_is_begun_and_everything_lives(small_disk: PrivateDaemon) -> None:
    a = Workload.start(small_disk, "a", SIZE)
    answer = fail_until_full(small_disk, "a")
    assert answer["code"] == "insufficient_disk"
    assert "No space left on device" in answer["error"]
    assert "rolled back" in answer["error"]
    state = a.entry["state"]
    assert f"now a is {state}" in answer["error"]
    a.require(state)
    refused(small_disk, "insufficient_disk", "run", name="b", cmd=["sleep", "60"])
    assert list(entries(small_disk)) == ["a"]
    (small_disk.state_dir / "filler").unlink()
    done(small_disk, "freeze", name="a")
    done(small_disk, "thaw", name="a")
    a.require("active")
    a.require_contents()
    small_disk.restart()
    a.require("active")
    a.require_contents()


@pytest.mark.root
def test_a_daemon_starts_on_a_full_disk_and_goes_on_when_there_is_room(
    small_disk: PrivateDaemon,
) -> None:
    a = Workload.start(small_disk, "a", SIZE)
    fail_until_full(small_disk, "a")
    state = a.entry["state"]
    small_disk.restart()
    a.require(state)
    refused(small_disk, "insufficient_disk", "thaw" if state == "frozen" else "freeze", name="a")
    (small_disk.state_dir / "filler").unlink()
    wait_until(
        lambda: request(small_disk.socket, "freeze", name="a")["ok"],
        within_s=10,
        what="the journal is written again",
    )
    done(small_disk, "thaw", name="a")
    a.require_contents()


@pytest.mark.root
def test_an_end_that_cannot_be_recorded_is_told_all_the_same_and_recorded_later(
    small_disk: PrivateDaemon, pool: ThreadPoolExecutor
) -> None:
    """The journal's last block is filled by another process's records, which are shorter than those of ``a``."""
    long_name = "a" * 64
    a = Workload.start(small_disk, long_name, SIZE)
    for _ in range(6):  # so that its story is as long as stories get
        done(small_disk, "freeze", name=long_name)
        done(small_disk, "thaw", name=long_name)
    done(small_disk, "run", name="b", cmd=["sleep", "60"])
    script = Script(small_disk.sim_dir)
    script.add("checkpoint", pid=a.pid, delay_s=1.0)
    asked = pool.submit(request, small_disk.socket, "freeze", name=long_name)
    wait_until(lambda: script.fired("checkpoint"), within_s=10, what="the intent is on disk")
    fail_until_full(small_disk, "b")
    assert asked.result(30)["ok"]
    a.require("frozen")
    events = request(small_disk.socket, "status")["result"]["recent_events"]
    assert any(e["type"] == "journal" and "No space left" in e["detail"] for e in events)
    small_disk.kill9()  # with the intent alone on disk
    (small_disk.state_dir / "filler").unlink()
    small_disk.start()
    a.require("frozen")
    done(small_disk, "thaw", name=long_name)
    a.require("active")
    a.require_contents()
