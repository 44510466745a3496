"""The simulated GPUs: every byte really moves, and capacity is kept to."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpusched import errors
from gpusched.mechanisms.sim import device
from gpusched.mechanisms.sim.control import read_stat
from gpusched.mechanisms.sim.driver import SimDriver
from gpusched.mechanisms.sim.layout import SimDirectory
from gpusched.mechanisms.sim.script import Script
from gpusched.ports import DriverState, Gpu
from gpusched.units import MIB
from simulated_program import (
    DEADLINE_S,
    VRAM,
    Program,
    Start,
    disk_bytes,
    failure,
    freeze,
    loaded,
    other_driver,
    state,
    thaw,
    used,
    uuids,
    wait_for,
)

pytest_plugins = ["simulated_fixtures"]

# -- moving ---------------------------------------------------------------------------------------


def test_a_freeze_moves_the_bytes_out_and_a_thaw_brings_them_back(
    directory: Path, sim: SimDriver, start: Start
) -> None:
    program = loaded(start)
    program.tell("alloc", 3 * MIB + 5)
    before = program.tell("digest")
    size = 11 * MIB + 5
    assert used(sim) == [size, 0]
    assert sim.usage().processes == {program.pid: {uuids(sim)[0]: size}}
    for _ in range(3):
        freeze(sim, program.pid)
        assert state(sim, program.pid) is DriverState.CHECKPOINTED
        assert used(sim) == [0, 0]
        assert sim.usage().processes == {}
        assert disk_bytes(directory / "procs") < MIB
        assert disk_bytes(directory / "saved") >= size
        thaw(sim, program.pid)
        assert state(sim, program.pid) is DriverState.RUNNING
        assert used(sim) == [size, 0]
        assert disk_bytes(directory / "saved") == 0
        assert program.tell("digest") == before


def test_calls_of_a_locked_process_wait_for_its_unlock(sim: SimDriver, start: Start) -> None:
    program = loaded(start)
    before = program.tell("digest")
    freeze(sim, program.pid)
    program.send("digest")
    assert program.is_silent(0.1)
    sim.restore(program.pid, None)
    assert state(sim, program.pid) is DriverState.LOCKED
    assert program.is_silent(0.1)
    sim.unlock(program.pid)
    assert program.answer() == before


def test_a_lock_that_times_out_leaves_the_process_running(sim: SimDriver, start: Start) -> None:
    program = loaded(start)
    assert program.tell("hold") == "inside"
    with pytest.raises(errors.LockTimeout) as raised:
        sim.lock(program.pid, 0.05)
    assert raised.value.details == {"call": "lock", "result": "NOT_READY", "pid": program.pid}
    assert state(sim, program.pid) is DriverState.RUNNING
    assert program.tell("leave") == "outside"
    assert len(program.tell("digest")) == 1
    sim.lock(program.pid, 5.0)


def test_a_lock_waits_for_the_call_that_is_under_way(sim: SimDriver, start: Start) -> None:
    program = loaded(start)
    assert program.tell("hold") == "inside"
    with ThreadPoolExecutor(1) as pool:
        locked = pool.submit(sim.lock, program.pid, DEADLINE_S)
        wait_for(lambda: state(sim, program.pid) is DriverState.LOCKED)
        assert not locked.done()
        program.send("leave")
        locked.result(DEADLINE_S)
    assert program.answer() == "outside"


def has_spun_since(program: Program, count: int) -> bool:
    return bool(program.tell("spun") > count)


def test_a_busy_process_with_many_threads_is_frozen_again_and_again(
    sim: SimDriver, start: Start
) -> None:
    program = loaded(start, MIB)
    program.tell("spin", 4)
    for _ in range(10):
        wait_for(functools.partial(has_spun_since, program, program.tell("spun")))
        freeze(sim, program.pid)
        thaw(sim, program.pid)
    assert program.process.poll() is None


def test_several_processes_are_frozen_and_thawed_at_once(sim: SimDriver, start: Start) -> None:
    programs = [loaded(start, 4 * MIB, seed) for seed in range(4)]
    before = [program.tell("digest") for program in programs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(lambda p: freeze(sim, p.pid), programs))
            assert used(sim) == [0, 0]
            list(pool.map(lambda p: thaw(sim, p.pid), programs))
    assert [program.tell("digest") for program in programs] == before


_RIGHT = {"lock": "running", "checkpoint": "locked", "restore": "checkpointed", "unlock": "locked"}
_WAY_THERE = {"running": (), "locked": ("lock",), "checkpointed": ("lock", "checkpoint")}
_WAY_BACK = {"running": (), "locked": ("unlock",), "checkpointed": ("restore", "unlock")}


@pytest.mark.parametrize(
    ("call", "reached"),
    [(call, reached) for call in _RIGHT for reached in _WAY_THERE if reached != _RIGHT[call]],
)
def test_a_call_in_the_wrong_state_is_refused_and_changes_nothing(
    sim: SimDriver, start: Start, call: str, reached: str
) -> None:
    program = loaded(start, MIB)
    before = program.tell("digest")
    calls: dict[str, Callable[[], None]] = {
        "lock": lambda: sim.lock(program.pid, 1.0),
        "checkpoint": lambda: sim.checkpoint(program.pid),
        "restore": lambda: sim.restore(program.pid, None),
        "unlock": lambda: sim.unlock(program.pid),
    }
    for step in _WAY_THERE[reached]:
        calls[step]()
    error = failure(calls[call])
    assert error.details == {"call": call, "result": "ILLEGAL_STATE", "pid": program.pid}
    assert state(sim, program.pid) == reached
    for step in _WAY_BACK[reached]:
        calls[step]()
    assert program.tell("digest") == before


def is_stopped(pid: int) -> bool:
    found = read_stat(pid)
    return found is not None and found.state == "T"


def test_a_stopped_process_is_neither_checkpointed_nor_restored(
    sim: SimDriver, start: Start
) -> None:
    program = loaded(start, MIB)
    sim.lock(program.pid, 5.0)
    calls: tuple[tuple[Callable[[], None], DriverState], ...] = (
        (lambda: sim.checkpoint(program.pid), DriverState.LOCKED),
        (lambda: sim.restore(program.pid, None), DriverState.CHECKPOINTED),
    )
    for call, reached in calls:
        os.kill(program.pid, signal.SIGSTOP)
        wait_for(functools.partial(is_stopped, program.pid))
        assert failure(call).details["result"] == "NOT_READY"
        assert state(sim, program.pid) is reached
        os.kill(program.pid, signal.SIGCONT)
        call()
    sim.unlock(program.pid)
    assert len(program.tell("digest")) == 1


# -- capacity -------------------------------------------------------------------------------------


def test_an_allocation_beyond_the_capacity_is_refused_with_the_numbers(
    sim: SimDriver, start: Start
) -> None:
    one, other = start(), start()
    one.tell("alloc", 40 * MIB)
    refused = other.tell("alloc", 40 * MIB)
    assert refused["error"] == "OutOfMemory"
    assert "40 MiB wanted" in refused["message"]
    assert "24 MiB of 64 MiB free" in refused["message"]
    assert other.tell("info") == [24 * MIB, 64 * MIB]
    assert other.tell("alloc", 24 * MIB) == 0
    one.tell("free", 0)
    assert other.tell("alloc", 40 * MIB) == 1
    assert used(sim) == [64 * MIB, 0]


def test_a_restore_without_room_is_refused_and_works_once_there_is_room(
    sim: SimDriver, start: Start
) -> None:
    cold = loaded(start, 40 * MIB)
    before = cold.tell("digest")
    freeze(sim, cold.pid)
    hot = loaded(start, 40 * MIB, seed=2)
    error = failure(lambda: sim.restore(cold.pid, None))
    assert error.details == {
        "call": "restore",
        "result": "OUT_OF_MEMORY",
        "pid": cold.pid,
        "gpu": uuids(sim)[0],
        "need_bytes": 40 * MIB,
        "free_bytes": 24 * MIB,
    }
    assert state(sim, cold.pid) is DriverState.CHECKPOINTED
    hot.end()
    thaw(sim, cold.pid)
    assert cold.tell("digest") == before


def test_a_restore_under_way_counts_and_its_promise_ends_with_the_driver(
    directory: Path, sim: SimDriver, start: Start, script: Script
) -> None:
    cold, hot = loaded(start, 40 * MIB), start()
    freeze(sim, cold.pid)
    script.add("restore", hang=True)
    helper = other_driver(directory, f"restore({cold.pid}, None)")
    wait_for(lambda: script.fired("restore"))
    assert used(sim) == [40 * MIB, 0]
    assert hot.tell("alloc", 40 * MIB)["error"] == "OutOfMemory"
    helper.kill()
    helper.wait()
    assert used(sim) == [0, 0]
    assert hot.tell("alloc", 40 * MIB) == 0


def test_a_dead_process_frees_its_gpu_and_its_files(
    directory: Path, sim: SimDriver, start: Start
) -> None:
    running, frozen = loaded(start), loaded(start)
    freeze(sim, frozen.pid)
    for program in (running, frozen):
        program.end()
        assert state(sim, program.pid) is DriverState.NONE
    assert used(sim) == [0, 0]
    assert list((directory / "procs").iterdir()) == []
    assert list((directory / "saved").iterdir()) == []
    assert failure(lambda: sim.lock(running.pid, 1.0)).details["result"] == "NOT_INITIALIZED"


def test_a_process_that_dies_during_its_checkpoint_is_an_error(
    sim: SimDriver, start: Start, script: Script
) -> None:
    program = loaded(start)
    sim.lock(program.pid, 5.0)
    script.add("checkpoint", when="middle", delay_s=0.2)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(sim.checkpoint, program.pid)
        wait_for(lambda: script.fired("checkpoint"))
        program.end()
        assert isinstance(work.exception(DEADLINE_S), errors.DriverError)
    assert state(sim, program.pid) is DriverState.NONE


# -- GPUs -----------------------------------------------------------------------------------------


def test_a_restore_with_a_map_moves_the_process_and_back(sim: SimDriver, start: Start) -> None:
    first, second = uuids(sim)
    program = loaded(start, visible="0")
    before = program.tell("digest")
    for expected in ([0, 8 * MIB], [8 * MIB, 0]):
        freeze(sim, program.pid)
        thaw(sim, program.pid, {first: second, second: first})
        assert used(sim) == expected
        assert program.tell("digest") == before
    freeze(sim, program.pid)
    thaw(sim, program.pid, {first: second, second: first})
    program.tell("alloc", MIB)
    assert used(sim) == [0, 9 * MIB]
    assert program.tell("info") == [VRAM - 9 * MIB, VRAM]
    freeze(sim, program.pid)
    thaw(sim, program.pid)  # without a map: where it was
    assert used(sim) == [0, 9 * MIB]


def test_a_map_that_is_no_full_permutation_is_refused(sim: SimDriver, start: Start) -> None:
    first, second = uuids(sim)
    program = loaded(start)
    freeze(sim, program.pid)
    for wrong in (
        {first: second},
        {first: second, second: second},
        {},
        {first: second, "x": first},
    ):
        error = failure(functools.partial(sim.restore, program.pid, wrong))
        assert error.details["result"] == "INVALID_VALUE"
        assert state(sim, program.pid) is DriverState.CHECKPOINTED
    thaw(sim, program.pid, {first: first, second: second})
    assert used(sim) == [8 * MIB, 0]


def test_a_migration_needs_room_on_the_other_gpu(sim: SimDriver, start: Start) -> None:
    first, second = uuids(sim)
    program, other = loaded(start, 40 * MIB), start()
    other.tell("alloc", 40 * MIB, 1)
    freeze(sim, program.pid)
    error = failure(lambda: sim.restore(program.pid, {first: second, second: first}))
    assert (error.details["result"], error.details["gpu"]) == ("OUT_OF_MEMORY", second)
    thaw(sim, program.pid)
    assert used(sim) == [40 * MIB, 40 * MIB]


def test_visible_devices_are_named_by_index_or_uuid(sim: SimDriver, start: Start) -> None:
    program = start(visible=uuids(sim)[1])
    program.tell("alloc", MIB)
    assert used(sim) == [0, MIB]
    assert program.tell("alloc", MIB, 1)["error"] == "SimError"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, (0, 1, 2)),
        ("2,0", (2, 0)),
        ("GPU-b", (1,)),
        ("GPU-c,0,GPU-a", ()),  # the same one twice
        ("1,7,0", (1,)),
        ("GPU-", ()),  # not unique
        ("", ()),
        ("-1", ()),
        (" 1 , GPU-c ", (1, 2)),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    setting: str | None, expected: tuple[int, ...]
) -> None:
    gpus = tuple(
        Gpu(index=index, uuid=f"GPU-{letter}", name="", total_bytes=1)
        for index, letter in enumerate("abc")
    )
    assert device.visible_gpus(gpus, setting) == expected


# -- the directory --------------------------------------------------------------------------------


def test_a_directory_is_found_again_with_the_same_gpus(directory: Path, sim: SimDriver) -> None:
    described = sim.describe()
    assert described.simulated
    assert [gpu.total_bytes for gpu in described.gpus] == [VRAM, VRAM]
    assert len({gpu.uuid for gpu in described.gpus}) == 2
    assert all(gpu.uuid.startswith("GPU-sim0000") for gpu in described.gpus)
    assert SimDriver.create(directory, 2, VRAM).describe() == described
    assert uuids(SimDriver.create(directory, 3, 2 * VRAM))[:2] == uuids(sim)


def test_other_figures_are_refused_while_processes_live(
    directory: Path, sim: SimDriver, start: Start
) -> None:
    program = loaded(start)
    with pytest.raises(errors.InvalidRequest, match="1 live processes"):
        SimDriver.create(directory, 1, VRAM)
    assert len(SimDirectory(directory).gpus) == 2
    program.end()
    assert len(SimDriver.create(directory, 1, VRAM).describe().gpus) == 1


@pytest.mark.parametrize(("gpus", "vram"), [(0, VRAM), (1, 0), (2000, VRAM)])
def test_impossible_figures_are_refused(directory: Path, gpus: int, vram: int) -> None:
    with pytest.raises(errors.InvalidRequest):
        SimDriver.create(directory, gpus, vram)


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(directory: Path) -> None:
    os.chown(directory, 65534, 65534)
    with pytest.raises(errors.PermissionDenied):
        SimDriver.create(directory, 1, VRAM)


def test_a_file_system_without_room_is_out_of_memory(
    sim: SimDriver, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = loaded(start)
    before = program.tell("digest")
    sim.lock(program.pid, 5.0)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "sendfile", full)
        assert failure(lambda: sim.checkpoint(program.pid)).details["result"] == "OUT_OF_MEMORY"
    assert state(sim, program.pid) is DriverState.LOCKED
    sim.unlock(program.pid)
    assert program.tell("digest") == before
