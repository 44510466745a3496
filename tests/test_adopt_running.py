"""Adopted without being stopped: frozen, its CPU threads go on, and its CUDA calls wait for the thaw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon
from gpusched.mechanisms.sim.control import CONTEXT_BYTES
from gpusched.mechanisms.sim.script import Script
from simulated_program import Program
from workloads import done, entries, refused

SIZE = 8 << 20


@pytest.fixture
def daemon(private_daemon: StartDaemon) -> PrivateDaemon:
    return private_daemon(vram="40M")


@pytest.fixture
def program(daemon: PrivateDaemon) -> Iterator[Program]:
    """With VRAM and two threads that use it without pause; adopted as ``it``."""
    program = Program(daemon.sim_dir, "0")
    try:
        program.tell("alloc", SIZE)
        program.tell("fill", 0, 1)
        program.tell("spin", 2)
        assert done(daemon, "adopt", name="it", pid=program.pid, stop=False)["stop"] is False
        yield program
    finally:
        program.end()


def letter(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def require_frozen_and_running(daemon: PrivateDaemon, program: Program, left_mb: int = 0) -> None:
    status = entries(daemon)["it"]
    assert (status["state"], status["stop"], status["adopted"]) == ("frozen", False, True)
    assert letter(program.pid) in "SR", "its CPU threads are not stopped"
    used = [gpu["mem_used_mb"] for gpu in done(daemon, "status")["gpus"]]
    assert used == [left_mb]
    count = program.tell("spun")  # needs no VRAM: answered at once
    assert program.tell("spun") == count, "its CUDA calls wait"


def require_thawed_with_its_contents(daemon: PrivateDaemon, program: Program) -> None:
    done(daemon, "thaw", name="it")
    assert entries(daemon)["it"]["state"] == "active"
    program.tell("digest")
    count = program.tell("spun")
    while program.tell("spun") == count:  # a wrong digest would have ended the process
        assert letter(program.pid) in "SR"


def test_frozen_it_runs_on_without_its_vram(daemon: PrivateDaemon, program: Program) -> None:
    for _ in range(3):
        assert done(daemon, "freeze", name="it")["mem_mb"] == SIZE >> 20
        require_frozen_and_running(daemon, program)
        program.send("digest")
        assert program.is_silent(0.2), "a call that needs VRAM waits for the thaw"
        done(daemon, "thaw", name="it")
        assert program.answer()
    require_thawed_with_its_contents(daemon, program)


def test_its_context_stays_and_goes_while_it_runs(daemon: PrivateDaemon, program: Program) -> None:
    for _ in range(2):
        kept = done(daemon, "freeze", name="it", keep_context=True)
        assert kept["context_mb"] == CONTEXT_BYTES >> 20
        require_frozen_and_running(daemon, program, left_mb=CONTEXT_BYTES >> 20)
        daemon.restart()
        require_frozen_and_running(daemon, program, left_mb=CONTEXT_BYTES >> 20)
        done(daemon, "thaw", name="it")
    done(daemon, "freeze", name="it", keep_context=True)
    done(daemon, "freeze", name="it")
    require_frozen_and_running(daemon, program)
    require_thawed_with_its_contents(daemon, program)


def test_a_daemon_that_was_killed_finds_it_again(daemon: PrivateDaemon, program: Program) -> None:
    done(daemon, "freeze", name="it")
    daemon.restart()
    require_frozen_and_running(daemon, program)
    require_thawed_with_its_contents(daemon, program)
    done(daemon, "freeze", name="it")
    require_frozen_and_running(daemon, program)


def test_it_is_not_stopped_either_when_the_journal_is_lost(
    daemon: PrivateDaemon, program: Program
) -> None:
    done(daemon, "freeze", name="it")
    daemon.kill9()
    (daemon.state_dir / "journal").write_bytes(b"nothing that could be read")
    daemon.start()
    require_frozen_and_running(daemon, program)
    require_thawed_with_its_contents(daemon, program)


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_freeze_that_fails_is_taken_back(
    daemon: PrivateDaemon, program: Program, call: str
) -> None:
    Script(daemon.sim_dir).add(call, error="OUT_OF_MEMORY")
    refused(daemon, "driver_error", "freeze", name="it")
    assert entries(daemon)["it"]["state"] == "active"
    done(daemon, "freeze", name="it")
    require_frozen_and_running(daemon, program)
    require_thawed_with_its_contents(daemon, program)


def test_a_thaw_that_fails_leaves_it_frozen_and_running(
    daemon: PrivateDaemon, program: Program
) -> None:
    done(daemon, "freeze", name="it")
    Script(daemon.sim_dir).add("restore", error="OUT_OF_MEMORY")
    refused(daemon, "driver_error", "thaw", name="it")
    require_frozen_and_running(daemon, program)
    require_thawed_with_its_contents(daemon, program)


def test_it_cannot_go_to_disk(daemon: PrivateDaemon, program: Program) -> None:
    refused(daemon, "unsupported", "hibernate", name="it")
    assert entries(daemon)["it"]["state"] == "active"
