"""What simulated targets do to the driver: fork, exec, die, belong to others, or lay traps."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpusched.mechanisms.sim.driver import SimDriver
from gpusched.ports import DriverState
from gpusched.units import MIB
from simulated_program import Start, failure, freeze, loaded, start_ticks, state, thaw, used

pytest_plugins = ["simulated_fixtures"]

# -- processes ------------------------------------------------------------------------------------


def test_a_forked_child_is_refused_and_has_no_state(sim: SimDriver, start: Start) -> None:
    program = loaded(start)
    told = program.tell("fork")
    assert told.startswith("refused: ")
    assert "before the fork" in told
    child = int(Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text())
    assert sim.states([program.pid, child]) == {
        program.pid: DriverState.RUNNING,
        child: DriverState.NONE,
    }
    freeze(sim, program.pid)
    thaw(sim, program.pid)
    assert program.tell("go on") == "parent goes on"


def test_a_process_that_executes_itself_anew_starts_afresh(sim: SimDriver, start: Start) -> None:
    program = loaded(start)
    assert program.tell("again") == "up"
    assert program.tell("alloc", MIB) == 0
    assert used(sim) == [MIB, 0]
    freeze(sim, program.pid)
    thaw(sim, program.pid)
    assert len(program.tell("digest")) == 1


def test_the_library_keeps_no_socket_in_the_target(start: Start) -> None:
    program = loaded(start)
    modes = [fd.stat().st_mode for fd in Path(f"/proc/{program.pid}/fd").iterdir()]
    assert modes
    assert not any(stat.S_ISSOCK(mode) for mode in modes)


def test_the_driver_follows_no_link_that_a_target_lays(
    directory: Path, sim: SimDriver, start: Start
) -> None:
    program = loaded(start)
    precious = directory / "precious"
    precious.write_bytes(b"x" * 8192)
    vram = next((directory / "procs").glob("*/vram-1"))
    sim.lock(program.pid, 5.0)
    vram.unlink()
    for lay in (vram.symlink_to, vram.hardlink_to):
        lay(precious)
        assert failure(lambda: sim.checkpoint(program.pid)).details["pid"] == program.pid
        vram.unlink()
    program.end()
    assert used(sim) == [0, 0]
    assert precious.read_bytes() == b"x" * 8192


@pytest.mark.parametrize("damage", [b"", b"GPUSIM01" + b"\xff" * 9000, b"\0" * 9000])
def test_a_damaged_control_file_hurts_nobody_else(
    directory: Path, sim: SimDriver, start: Start, damage: bytes
) -> None:
    program, sound = loaded(start), loaded(start)
    control = directory / "procs" / f"{program.pid}-{start_ticks(program.pid)}" / "control"
    control.write_bytes(damage)
    assert state(sim, program.pid) is DriverState.NONE
    assert failure(lambda: sim.lock(program.pid, 1.0)).details["result"] == "INVALID_VALUE"
    SimDriver(directory)
    freeze(sim, sound.pid)
    thaw(sim, sound.pid)


@pytest.mark.root
def test_root_freezes_an_ordinary_users_process_and_keeps_the_copy_to_itself(
    directory: Path, sim: SimDriver, start: Start
) -> None:
    directory.chmod(0o755)
    program = start()
    program.tell("become", 65534)
    program.tell("alloc", 8 * MIB)
    program.tell("fill", 0, 1)
    before = program.tell("digest")
    freeze(sim, program.pid)
    saved = directory / "saved"
    assert (saved.stat().st_uid, stat.S_IMODE(saved.stat().st_mode)) == (0, 0o700)
    modes = {p.name: p.stat() for p in (directory / "procs").glob("*/*")}
    assert stat.S_IMODE(modes["vram-1"].st_mode) == 0o600
    assert modes["vram-1"].st_uid == 65534
    thaw(sim, program.pid)
    assert program.tell("digest") == before


@pytest.mark.root
def test_another_users_directory_for_a_process_is_not_believed(
    directory: Path, sim: SimDriver, start: Start
) -> None:
    program = loaded(start)
    os.chown(directory / "procs" / f"{program.pid}-{start_ticks(program.pid)}", 65534, 65534)
    assert failure(lambda: sim.lock(program.pid, 1.0)).details["result"] == "NOT_PERMITTED"
