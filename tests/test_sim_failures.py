"""A simulated driver that is killed loses nothing, and fails as ordered."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpusched import errors
from gpusched.mechanisms.sim import driver
from gpusched.mechanisms.sim.driver import SimDriver
from gpusched.mechanisms.sim.script import Script, When
from gpusched.ports import DriverState
from gpusched.units import MIB
from simulated_program import (
    DEADLINE_S,
    Start,
    bring_back,
    disk_bytes,
    failure,
    freeze,
    loaded,
    other_driver,
    state,
    used,
    wait_for,
)

pytest_plugins = ["simulated_fixtures"]

# -- a driver that is killed ----------------------------------------------------------------------


_L, _C, _R = DriverState.LOCKED, DriverState.CHECKPOINTED, DriverState.RUNNING


@pytest.mark.parametrize("dies", ["killed", "crashes"])
@pytest.mark.parametrize(
    ("call", "when", "during", "left"),
    [
        ("lock({pid}, 5.0)", "before", _R, _R),
        ("lock({pid}, 5.0)", "after", _L, _L),
        ("checkpoint({pid})", "before", DriverState.CHANGING, _L),
        ("checkpoint({pid})", "middle", DriverState.CHANGING, _L),
        ("checkpoint({pid})", "after", _C, _C),
        ("restore({pid}, None)", "before", DriverState.CHANGING, _C),
        ("restore({pid}, None)", "middle", DriverState.CHANGING, _C),
        ("restore({pid}, None)", "after", _L, _L),
        ("unlock({pid})", "before", _L, _L),
        ("unlock({pid})", "after", _R, _R),
    ],
)
def test_a_driver_that_dies_anywhere_loses_nothing(
    directory: Path,
    sim: SimDriver,
    start: Start,
    script: Script,
    call: str,
    when: When,
    during: DriverState,
    left: DriverState,
    dies: str,
) -> None:
    program = loaded(start)
    before = program.tell("digest")
    name = call.partition("(")[0]
    if name != "lock":
        sim.lock(program.pid, 5.0)
    if name == "restore":
        sim.checkpoint(program.pid)
    script.add(name, when=when, hang=dies == "killed", crash=dies == "crashes")
    helper = other_driver(directory, call.format(pid=program.pid))
    if dies == "killed":
        wait_for(lambda: script.fired(name))
        assert state(sim, program.pid) is during
        helper.kill()
    assert helper.wait(DEADLINE_S) == (-9 if dies == "killed" else 70)

    after = SimDriver(directory)
    assert state(after, program.pid) is left
    assert disk_bytes(directory / ("procs" if left is _C else "saved")) < MIB
    bring_back(after, program.pid)
    assert program.tell("digest") == before


def test_a_driver_killed_at_random_instants_loses_nothing(
    directory: Path, sim: SimDriver, start: Start, soak: bool
) -> None:
    program = loaded(start, 32 * MIB)
    before = program.tell("digest")
    loop = f"lock({program.pid}, 5); d = SimDriver(Path(sys.argv[1]))\nwhile True:\n"
    loop += "".join(
        f"  d.{call}\n"
        for call in (
            f"checkpoint({program.pid})",
            f"restore({program.pid}, None)",
            f"unlock({program.pid})",
            f"lock({program.pid}, 5)",
        )
    )
    chance = random.Random(7)
    for _ in range(100 if soak else 5):
        helper = other_driver(directory, loop)
        wait_for(lambda: state(sim, program.pid) is not DriverState.RUNNING)
        time.sleep(chance.random() * 0.1)  # not a wait for anything: the instant is the point
        helper.kill()
        helper.wait()
        bring_back(SimDriver(directory), program.pid)
        assert program.tell("digest") == before
        assert disk_bytes(directory / "saved") == 0


#: Makes a whole cycle of driver calls for each line it reads, and kills itself at that many lines of the driver's code.
KILLED_AT_A_LINE = """
import os, signal, sys
from pathlib import Path
from gpusched.mechanisms.sim.driver import SimDriver

directory, pid = Path(sys.argv[1]), int(sys.argv[2])
for line in sys.stdin:
    left = int(line)
    child = os.fork()
    if child == 0:
        driver = SimDriver(directory)
        first, second = (gpu.uuid for gpu in driver.describe().gpus)
        def trace(frame, event, arg):
            global left
            if "mechanisms/sim" not in frame.f_code.co_filename:
                return None
            if event == "line":
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return trace
        sys.settrace(trace)
        driver.lock(pid, 5)
        driver.checkpoint(pid)
        driver.restore(pid, {first: second, second: first})
        driver.unlock(pid)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_driver_killed_at_any_line_of_its_code_loses_nothing(
    directory: Path, sim: SimDriver, start: Start, soak: bool
) -> None:
    program = loaded(start, MIB)
    program.tell("alloc", 4096)
    before = program.tell("digest")
    killed = 0
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_AT_A_LINE, str(directory), str(program.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as killer:
        assert killer.stdin is not None
        assert killer.stdout is not None
        for line in range(0, 100_000, 1 if soak else 7):
            killer.stdin.write(f"{line}\n")
            killer.stdin.flush()
            status = int(killer.stdout.readline())
            bring_back(SimDriver(directory), program.pid)
            assert program.tell("digest") == before, f"killed at line {line}"
            assert sorted(used(sim)) == [0, MIB + 4096]
            assert disk_bytes(directory / "saved") == 0
            if status == 0:
                break
            assert status == -signal.SIGKILL
            killed += 1
    assert killed > 20


def test_a_second_call_on_the_same_process_is_refused_while_one_is_under_way(
    directory: Path,
    sim: SimDriver,
    start: Start,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = loaded(start)
    sim.lock(program.pid, 5.0)
    script.add("checkpoint", hang=True)
    helper = other_driver(directory, f"checkpoint({program.pid})")
    wait_for(lambda: script.fired("checkpoint"))
    monkeypatch.setattr(driver, "_BUSY_WAIT_S", 0.05)
    assert failure(lambda: sim.unlock(program.pid)).details["result"] == "NOT_READY"
    assert state(sim, program.pid) is DriverState.CHANGING
    helper.kill()
    helper.wait()
    sim.unlock(program.pid)


# -- failures on order ----------------------------------------------------------------------------


def test_a_scripted_error_comes_as_often_as_ordered_and_counts_across_processes(
    directory: Path, sim: SimDriver, start: Start, script: Script
) -> None:
    program = loaded(start)
    script.add("lock", skip=1, times=2, error="UNKNOWN")
    outcomes = []
    for _ in range(5):
        try:
            SimDriver(directory).lock(program.pid, 5.0)
            sim.unlock(program.pid)
            outcomes.append("locked")
        except errors.DriverError as error:
            outcomes.append(error.details["result"])
    assert outcomes == ["locked", "UNKNOWN", "UNKNOWN", "locked", "locked"]
    assert script.fired("lock") == 2
    script.clear()
    assert script.fired("lock") == 0


def test_a_rule_for_one_pid_leaves_the_others_alone(
    sim: SimDriver, start: Start, script: Script
) -> None:
    one, other = loaded(start), loaded(start)
    script.add("lock", pid=one.pid, error="LOCK_TIMEOUT", times=None)
    sim.lock(other.pid, 5.0)
    for _ in range(3):
        with pytest.raises(errors.LockTimeout):
            sim.lock(one.pid, 5.0)
    assert state(sim, one.pid) is DriverState.RUNNING


@pytest.mark.parametrize(("when", "left"), [("before", _L), ("middle", _L), ("after", _C)])
def test_an_error_may_come_before_during_or_after_the_work(
    directory: Path, sim: SimDriver, start: Start, script: Script, when: When, left: DriverState
) -> None:
    program = loaded(start)
    before = program.tell("digest")
    sim.lock(program.pid, 5.0)
    script.add("checkpoint", when=when, error="OUT_OF_MEMORY")
    assert failure(lambda: sim.checkpoint(program.pid)).details["result"] == "OUT_OF_MEMORY"
    assert state(sim, program.pid) is left
    assert disk_bytes(directory / ("procs" if left is _C else "saved")) < MIB
    bring_back(sim, program.pid)
    assert program.tell("digest") == before


def test_a_slow_call_changes_the_state_for_as_long_as_it_takes(
    sim: SimDriver, start: Start, script: Script
) -> None:
    program = loaded(start)
    sim.lock(program.pid, 5.0)
    script.add("checkpoint", delay_s=0.2)
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        work = pool.submit(sim.checkpoint, program.pid)
        wait_for(lambda: script.fired("checkpoint"))
        assert state(sim, program.pid) is DriverState.CHANGING
        work.result(DEADLINE_S)
        assert time.monotonic() - began >= 0.2
    assert state(sim, program.pid) is DriverState.CHECKPOINTED


def test_a_process_can_be_left_failed(sim: SimDriver, start: Start, script: Script) -> None:
    program = loaded(start)
    freeze(sim, program.pid)
    script.add("restore", error="NOT_SUPPORTED", state="failed")
    failure(lambda: sim.restore(program.pid, None))
    assert state(sim, program.pid) is DriverState.FAILED
    assert failure(lambda: sim.restore(program.pid, None)).details["result"] == "ILLEGAL_STATE"
    assert program.tell("digest")["error"] == "SimError"


def test_answers_about_states_and_obstacles_can_be_ordered(
    sim: SimDriver, start: Start, script: Script
) -> None:
    program = loaded(start)
    assert sim.obstacles([program.pid]) == []
    script.add("states", pid=program.pid, state="unknown")
    script.add(
        "obstacles",
        pid=program.pid,
        obstacle={"kind": "ipc", "message": "close it first", "certain": False},
    )
    assert state(sim, program.pid) is DriverState.UNKNOWN
    assert state(sim, program.pid) is DriverState.RUNNING
    found = sim.obstacles([1, program.pid])
    assert [(o.pid, o.kind, o.certain) for o in found] == [(program.pid, "ipc", False)]
    assert sim.obstacles([program.pid]) == []


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"call": "no such"}]', '[{"call": "lock", "x": 1}]']
)
def test_a_script_that_cannot_be_read_is_an_error_not_a_crash(
    directory: Path, sim: SimDriver, text: str
) -> None:
    (directory / "script.json").write_text(text)
    assert "script.json" in failure(sim.usage).message
