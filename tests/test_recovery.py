"""The daemon may die at any instant: its successor finds everything, says what is true, and ends what was half done.

``GPUSCHED_SEED=N`` repeats the random courses of seed N; each prints its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, request, wait_until
from gpusched.mechanisms.journal import decode_records, encode_record
from gpusched.mechanisms.sim.control import Word, Work, read_stat
from gpusched.mechanisms.sim.script import Script, When
from gpusched.rescue import rescue
from simulated_program import Program
from workloads import Workload, done, entries

SIZE = "12M"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def ask(daemon: PrivateDaemon, method: str, **params: Any) -> dict[str, Any] | None:
    """The answer, or None when the daemon died before it gave one."""
    try:
        return request(daemon.socket, method, **params)
    except (ConnectionError, FileNotFoundError):
        return None


def killed_when(
    daemon: PrivateDaemon,
    pool: ThreadPoolExecutor,
    condition: Callable[[], object],
    method: str,
    **params: Any,
) -> None:
    """Asks for something, and kills the daemon as soon as ``condition()`` is true."""
    asked: Future[dict[str, Any] | None] = pool.submit(lambda: ask(daemon, method, **params))
    wait_until(condition, within_s=10, what=f"{method} is under way")
    daemon.kill9()
    assert asked.result(10) is None, "the answer came before the daemon died"


def notes(daemon: PrivateDaemon) -> str:
    """What the daemon said at its start about what it found."""
    events = request(daemon.socket, "status")["result"]["recent_events"]
    return "\n".join(e["detail"] for e in events if e["type"] == "recovery")


# -- killed at a known instant ----------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "middle", "after"])
@pytest.mark.parametrize(
    ("method", "call", "is_frozen_before"),
    [
        ("freeze", "lock", False),
        ("freeze", "checkpoint", False),
        ("thaw", "restore", True),
        ("thaw", "unlock", True),
    ],
)
def test_killed_during_any_driver_call_the_process_is_taken_back_or_is_there(
    private_daemon: StartDaemon,
    pool: ThreadPoolExecutor,
    method: str,
    call: str,
    is_frozen_before: bool,
    when: When,
) -> None:
    """The helper ends its call after its daemon; a lock still to come must not surprise the next daemon."""
    if when == "middle" and call in ("lock", "unlock"):
        pytest.skip("these have no middle")
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", SIZE)
    if is_frozen_before:
        done(daemon, "freeze", name="a")
    script = Script(daemon.sim_dir)
    # A lock that is still to come when the next daemon looks is the one that its look does not show.
    script.add(call, when=when, delay_s=1.0 if (call, when) == ("lock", "before") else 0.3)
    helper = helper_of(daemon)
    killed_when(daemon, pool, lambda: script.fired(call), method, name="a")
    daemon.start()
    wait_until(lambda: read_stat(helper) is None, within_s=10, what="the old helper has ended")
    state = entries(daemon)["a"]["state"]
    before, goal = ("frozen", "active") if is_frozen_before else ("active", "frozen")
    assert state in (before, goal)
    a.require(state)
    done(daemon, "freeze" if state == "active" else "thaw", name="a")
    done(daemon, "freeze" if state == "frozen" else "thaw", name="a")
    done(daemon, "thaw", name="a")
    a.require("active")
    a.require_contents()


@pytest.mark.parametrize(
    ("call", "helper_too", "is_back"),
    [("checkpoint", False, True), ("restore", False, False), ("restore", True, True)],
)
def test_killed_in_the_middle_of_a_swap_the_whole_is_finished_or_taken_back(
    private_daemon: StartDaemon,
    pool: ThreadPoolExecutor,
    call: str,
    helper_too: bool,
    is_back: bool,
) -> None:
    """The helper outlives its daemon and ends its call, so a swap that was on its last step has come to its goal."""
    daemon = private_daemon(vram="20M")
    a = Workload.start(daemon, "a", SIZE, seed=1)
    done(daemon, "freeze", name="a")
    b = Workload.start(daemon, "b", SIZE, seed=2)
    script = Script(daemon.sim_dir)
    script.add(call, when="middle", delay_s=0.3)
    helper = helper_of(daemon)
    killed_when(daemon, pool, lambda: script.fired(call), "swap", off="b", on="a")
    if helper_too:
        os.kill(helper, signal.SIGKILL)
    daemon.start()
    off, on = (a, b) if is_back else (b, a)
    off.require("frozen")
    on.require("active")
    assert f"{on.name} was" in notes(daemon) or "taking back swap" in notes(daemon)
    on.require_contents()
    done(daemon, "swap", off=on.name, on=off.name)
    off.require_contents()


def test_a_migration_that_was_done_but_not_recorded_is_found_where_it_is(
    private_daemon: StartDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = private_daemon(gpus=2, vram="20M")
    a = Workload.start(daemon, "a", SIZE)
    script = Script(daemon.sim_dir)
    script.add("unlock", when="after", delay_s=0.3)
    killed_when(daemon, pool, lambda: script.fired("unlock"), "migrate", name="a", gpu=1)
    daemon.start()
    a.require("active", gpu=1)
    done(daemon, "migrate", name="a", gpu=0)
    a.require("active", gpu=0)
    a.require_contents()


def test_killed_between_intent_and_launch_the_name_is_free_and_nothing_runs(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon()
    daemon.stop()
    journal = daemon.state_dir / "journal"
    intent = {
        "proc": {
            "tree_id": "0123456789abcdef",
            "name": "a",
            "uid": 0,
            "user": "root",
            "gpus": [],
            "started_unix_s": 1.0,
            "last_used_unix_s": 1.0,
        }
    }
    with journal.open("ab") as file:
        file.write(encode_record(intent))
    daemon.start()
    assert entries(daemon) == {}
    assert "a had not been started; its name is free" in notes(daemon)
    done(daemon, "run", name="a", cmd=["sleep", "60"])


def test_killed_after_the_launch_and_before_it_was_recorded_the_process_is_managed(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", SIZE)
    daemon.kill9()
    # The journal as it was when the launch began: without what the launch said.
    journal = daemon.state_dir / "journal"
    header, *records = decode_records(journal.read_bytes())
    first = next(r for r in records if r.get("proc", {}).get("name") == "a")
    assert first["proc"]["main"] is None
    journal.write_bytes(encode_record(header) + encode_record(first))
    daemon.start()
    assert f"a had been started (pid {a.pid})" in notes(daemon)
    a.require("active")
    done(daemon, "freeze", name="a")
    a.require("frozen")
    done(daemon, "thaw", name="a")
    a.require_contents()


@pytest.mark.parametrize("frozen", [False, True])
def test_killed_in_the_middle_of_an_adoption_the_process_is_managed(
    private_daemon: StartDaemon, frozen: bool
) -> None:
    daemon = private_daemon(vram="40M")
    program = Program(daemon.sim_dir, "0")
    try:
        program.tell("alloc", 4 << 20)
        done(daemon, "adopt", name="it", pid=program.pid)
        if frozen:
            done(daemon, "freeze", name="it")
        daemon.kill9()
        journal = daemon.state_dir / "journal"
        header, *records = decode_records(journal.read_bytes())
        first = next(r for r in records if r.get("proc", {}).get("name") == "it")
        assert first["proc"]["state"] == "starting"
        journal.write_bytes(encode_record(header) + encode_record(first))
        daemon.start()
        entry = entries(daemon)["it"]
        assert (entry["state"], entry["pid"]) == ("frozen" if frozen else "active", program.pid)
        done(daemon, "thaw" if frozen else "freeze", name="it")
        done(daemon, "thaw", name="it")
        assert program.tell("digest")
        program.process.kill()
        wait_until(
            lambda: entries(daemon)["it"]["state"] == "dead", within_s=5, what="its end is seen"
        )
    finally:
        program.end()


def test_what_ended_while_no_daemon_ran_ended_with_a_known_status(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(vram="40M")
    frozen = Workload.start(daemon, "frozen", SIZE)
    done(daemon, "freeze", name="frozen")
    go = daemon.directory / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.01; done"
    for name, end in (("seven", "exit 7"), ("zero", "exit 0"), ("term", "kill -TERM $$")):
        done(daemon, "run", name=name, cmd=["sh", "-c", f"echo begun; {wait}; echo ends; {end}"])
    daemon.kill9()
    os.kill(frozen.pid, signal.SIGKILL)
    go.touch()
    # Started at once: the ends and the new daemon's look at them come at the same time.
    daemon.start()

    def ended() -> dict[str, tuple[int | None, int | None]]:
        return {
            name: (e["exit_code"], e["exit_signal"])
            for name, e in entries(daemon).items()
            if e["state"] == "dead"
        }

    wait_until(lambda: len(ended()) == 4, within_s=10, what="all are known to have ended")
    assert ended() == {
        "seven": (7, None),
        "zero": (0, None),
        "term": (None, 15),
        "frozen": (None, 9),
    }
    assert (daemon.log_dir / "seven.log").read_text() == "begun\nends\n"
    assert request(daemon.socket, "logs", name="seven")["result"]["lines"] == ["begun", "ends"]


# -- the driver's helper ------------------------------------------------------------------------------


def helper_of(daemon: PrivateDaemon) -> int:
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    (found,) = [
        int(pid) for pid in children if b"driver_host" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


@pytest.mark.parametrize(
    ("method", "call", "state"), [("freeze", "checkpoint", "active"), ("thaw", "restore", "frozen")]
)
def test_a_helper_that_is_killed_in_the_middle_costs_one_operation(
    private_daemon: StartDaemon, pool: ThreadPoolExecutor, method: str, call: str, state: str
) -> None:
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", SIZE)
    if method == "thaw":
        done(daemon, "freeze", name="a")
    script = Script(daemon.sim_dir)
    script.add(call, when="middle", delay_s=30)
    first = helper_of(daemon)
    asked = pool.submit(request, daemon.socket, method, name="a")
    wait_until(lambda: script.fired(call), within_s=10, what=f"{call} is under way")
    os.kill(first, signal.SIGKILL)
    answer = asked.result(30)
    assert answer["code"] == "unavailable"
    assert f"the driver helper (pid {first}) ended in the middle of a call" in answer["error"]
    a.require(state)
    assert helper_of(daemon) != first
    done(daemon, method, name="a")
    done(daemon, "thaw", name="a")
    a.require_contents()


def test_helper_and_daemon_killed_together_cost_nothing(
    private_daemon: StartDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", SIZE)
    script = Script(daemon.sim_dir)
    script.add("checkpoint", when="middle", delay_s=30)
    helper = helper_of(daemon)
    killed_when(daemon, pool, lambda: script.fired("checkpoint"), "freeze", name="a")
    assert a.driver()[1] is Work.CHECKPOINTING
    os.kill(helper, signal.SIGKILL)
    daemon.start()
    a.require("active")
    a.require_contents()


# -- the journal and the state directory ----------------------------------------------------------------


def test_an_unreadable_journal_is_kept_aside_and_rebuilt_from_the_trees(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(gpus=2, vram="20M")
    a = Workload.start(daemon, "a", SIZE, gpu=1)
    b = Workload.start(daemon, "b", SIZE, gpu=0)
    done(daemon, "freeze", name="b")
    done(daemon, "run", name="idle", cmd=["sleep", "60"])
    program = Program(daemon.sim_dir, "0")
    try:
        program.tell("alloc", 4 << 20)
        done(daemon, "adopt", name="it", pid=program.pid)
        daemon.kill9()
        journal = daemon.state_dir / "journal"
        data = bytearray(journal.read_bytes())
        data[len(data) // 2] ^= 0xFF
        journal.write_bytes(data)
        daemon.start()
        (aside,) = daemon.state_dir.glob("journal.unreadable-*")
        assert aside.read_bytes() == data
        assert set(entries(daemon)) == {"a", "b", "idle", "it"}
        assert "a is not in the journal; taken from its supervisor's record" in notes(daemon)
        assert entries(daemon)["it"]["adopted"]
        a.require("active", gpu=1)
        b.require("frozen", gpu=0)
        done(daemon, "thaw", name="b")
        b.require("active", gpu=0)
        for workload in (a, b):
            workload.require_contents()
    finally:
        program.end()


def test_a_journal_of_another_backend_is_refused_and_untouched(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon()
    daemon.stop()
    journal = daemon.state_dir / "journal"
    journal.write_bytes(encode_record({"v": 1, "backend": "cuda"}))
    with pytest.raises(AssertionError, match="was written with the cuda backend, not sim"):
        daemon.start()
    assert decode_records(journal.read_bytes()) == [{"v": 1, "backend": "cuda"}]
    journal.unlink()
    daemon.start()


def test_a_second_daemon_on_the_same_state_directory_is_refused(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon()
    done(daemon, "run", name="idle", cmd=["sleep", "60"])
    other = subprocess.run(
        [
            *(sys.executable, "-m", "gpusched", "-s", str(daemon.directory / "other"), "daemon"),
            *("--backend", "sim", "--state-dir", str(daemon.state_dir)),
            *("--log-dir", str(daemon.log_dir)),
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert other.returncode == 6
    assert f"another daemon uses {daemon.state_dir}" in other.stderr
    assert entries(daemon)["idle"]["state"] == "active"
    assert not (daemon.directory / "other").exists()


def test_rescue_thaws_a_frozen_process_without_a_daemon(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="40M")
    a = Workload.start(daemon, "a", SIZE)
    done(daemon, "freeze", name="a")
    daemon.kill9()
    found = rescue(a.pid)
    assert found["pid"] == a.pid
    (process,) = [p for p in found["processes"] if p["pid"] == a.pid]
    assert (process["before"], process["after"]) == ("checkpointed", "running")
    assert a.driver()[0] is Word.RUNNING
    assert not a.is_stopped
    a.require_contents()
    daemon.start()
    a.require("active")
    assert "a was frozen; is active now" in notes(daemon)


# -- killed at any instant ------------------------------------------------------------------------------


@dataclass
class Course:
    """Some workloads, random requests for them from two clients, and a daemon that is killed meanwhile."""

    daemon: PrivateDaemon
    chance: random.Random
    workloads: dict[str, Workload]
    adopted: Program

    def one_round(self, number: int) -> None:
        """Random requests from two threads for a random while, kill -9, restart, and the truth."""
        killed = threading.Event()
        seeds = [self.chance.random() for _ in range(2)]
        with ThreadPoolExecutor(2) as clients:
            asked = [clients.submit(self._requests, random.Random(seed), killed) for seed in seeds]
            time.sleep(
                self.chance.random() * 0.4
            )  # not a wait for anything: the instant is the point
            self.daemon.kill9()
            killed.set()
            for each in asked:
                each.result(30)
        if self.chance.random() < 0.2:
            self._end_one_meanwhile()
        self.daemon.start()
        self.require_truth()
        self._mend(number)

    def _requests(self, chance: random.Random, killed: threading.Event) -> None:
        names = [*sorted(self.workloads), "it"]
        while not killed.is_set():
            one, other = chance.sample(names, 2)
            requests: list[tuple[str, dict[str, Any]]] = [
                ("freeze", {"name": one}),
                ("thaw", {"name": one}),
                ("thaw", {"name": one, "evict": True}),
                ("swap", {"off": one, "on": other}),
                ("migrate", {"name": one, "gpu": chance.randrange(2)}),
                ("run", {"name": "brief", "cmd": ["sleep", "60"]}),
                ("freeze", {"name": "brief"}),
                ("kill", {"name": "brief"}),
                ("adopt", {"name": "it", "pid": self.adopted.pid}),
            ]
            method, params = chance.choice(requests)
            answer = ask(self.daemon, method, **params)
            if answer is None:
                return
            assert answer.get("code") not in ("internal", "process_lost", "driver_error"), answer

    def _end_one_meanwhile(self) -> None:
        """Nobody sees it end but its supervisor."""
        name = self.chance.choice(sorted(self.workloads))
        os.kill(self.workloads[name].pid, signal.SIGKILL)
        gone = self.workloads.pop(name)
        self.daemon.start()
        wait_until(
            lambda: entries(self.daemon)[name]["state"] == "dead", within_s=10, what=f"{name} ended"
        )
        assert entries(self.daemon)[name]["exit_signal"] == 9
        gone.require_log()
        done(self.daemon, "kill", name=name)
        self.daemon.kill9()

    def require_truth(self) -> None:
        """Everybody is there, and what the daemon, the driver and the kernel say is the same."""
        listed = entries(self.daemon)
        assert set(listed) - {"brief", "it"} == set(self.workloads)
        for name, workload in self.workloads.items():
            assert listed[name]["state"] in ("active", "frozen"), listed[name]
            workload.require(listed[name]["state"])
            workload.require_log()
        if "brief" in listed and listed["brief"]["state"] != "dead":
            letter = Path(f"/proc/{listed['brief']['pid']}/stat").read_text().split()[2]
            assert listed["brief"]["state"] == ("frozen" if letter == "T" else "active")

    def _mend(self, number: int) -> None:
        """Thaws one after the other, so that each one's contents are seen; starts anew what was ended."""
        for name, workload in self.workloads.items():
            for other in self.workloads:
                if other != name:
                    done(self.daemon, "freeze", name=other)
            done(self.daemon, "thaw", name=name)
            if number % 3 == 0 or len(self.workloads) < 3:
                workload.require_contents()
        for name in {"a", "b", "c"} - set(self.workloads):
            for other in self.workloads:
                done(self.daemon, "freeze", name=other)
            self.workloads[name] = Workload.start(self.daemon, name, SIZE, seed=ord(name) + number)


def test_what_a_daemon_was_killed_over_while_it_forgot_it_is_forgotten(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon()
    workload = Workload.start(daemon, "w", SIZE, seed=1)
    done(daemon, "run", name="brief", cmd=["true"])
    wait_until(lambda: entries(daemon)["brief"]["state"] == "dead", within_s=10, what="it ends")
    files = daemon.state_dir / "trees"
    kept = daemon.directory / "kept"
    before = set(files.iterdir())
    shutil.copytree(files, kept)
    done(daemon, "kill", name="brief")
    wait_until(lambda: set(files.iterdir()) != before, within_s=10, what="it is forgotten")
    (brief,) = {path.name for path in before} - {path.name for path in files.iterdir()}
    daemon.kill9()
    shutil.move(kept / brief, files)
    (daemon.sim_dir / "trees" / brief / "procs").mkdir(parents=True, exist_ok=True)
    stray = daemon.sim_dir / "trees" / "00000000deadbeef"  # and of one that has no file any more
    (stray / "procs").mkdir(parents=True)
    daemon.start()
    assert not (files / brief).exists()
    assert not (daemon.sim_dir / "trees" / brief).exists()
    assert not stray.exists()
    workload.require("active")


def test_killed_at_random_instants_of_random_operations_nothing_is_lost(
    private_daemon: StartDaemon, soak: bool
) -> None:
    seed = int(os.environ.get("GPUSCHED_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    print(f"GPUSCHED_SEED={seed}")
    daemon = private_daemon(gpus=2, vram="20M")
    workloads = {}
    for number, name in enumerate("abc"):
        workloads[name] = Workload.start(daemon, name, SIZE, gpu=number % 2, seed=number)
        done(daemon, "freeze", name=name)
    adopted = Program(daemon.sim_dir, "0")
    with contextlib.ExitStack() as stack:
        stack.callback(adopted.end)
        adopted.tell("alloc", 1 << 20)
        course = Course(daemon, random.Random(seed), workloads, adopted)
        for number in range(100 if soak else 10):
            try:
                course.one_round(number)
            except BaseException as error:
                error.add_note(
                    f"in round {number} of GPUSCHED_SEED={seed}\n{daemon.log_text()[-4000:]}"
                )
                raise
        if "it" in entries(daemon):
            done(daemon, "thaw", name="it", evict=True)
        assert adopted.tell("digest")
