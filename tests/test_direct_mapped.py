"""Physical memory that a program makes and maps itself takes the line-rate path too, against the stand-in driver.

The programs of ``standin/mapper.py`` check themselves in every step; see there for what each kind does.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import standin_cuda
from daemons import wait_until
from direct_bench import Bench, kill_movers, memory_files, off, thaw_whatever
from gpusched import errors
from gpusched.mechanisms.cuda import mover_client
from gpusched.mechanisms.cuda.target import Target
from gpusched.ports import DriverState
from gpusched.units import MIB
from standin_cuda import SOURCES, Program

pytest_plugins = ["direct_fixtures"]
pytestmark = pytest.mark.skipif(standin_cuda.compiler() is None, reason="needs a C compiler")

PAGE = 2 * MIB


def start(
    standin: Path, tmp_path: Path, *arguments: object, limit: str = "", **env: str
) -> Program:
    """``limit``: on its descriptors, as the shell's ulimit understands it."""
    command = [sys.executable, str(SOURCES / "mapper.py"), *map(str, arguments)]
    if limit:
        command = ["bash", "-c", f'ulimit {limit} && exec "$@"', "bash", *command]
    return Program(standin, tmp_path / f"{arguments[0]}.log", command=command, **env)


def seed() -> int:
    number = random.randrange(10**6)
    print("seed", number)
    return number


@pytest.mark.parametrize("keep_context", [False, True])
def test_whatever_a_program_does_with_its_memory_all_of_it_moves(
    bench: Bench, standin: Path, tmp_path: Path, keep_context: bool
) -> None:
    rng = random.Random(seed())
    with start(standin, tmp_path, "random", 3, rng.randrange(10**6)) as program:
        for _ in range(15):
            time.sleep(rng.uniform(0, 0.05))
            bench.freeze(program.pid, keep_context=keep_context)
            assert bench.direct.last(program.pid).path == "direct"
            assert bench.state(program.pid) == off(keep_context)
            assert memory_files(program.pid) == 0
            bench.thaw(program.pid)
        program.runs_on()
    bench.direct.forget_dead()
    assert bench.direct.pool.snapshots() == []


def test_it_comes_back_from_its_own_memory_as_it_was(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with start(standin, tmp_path, "random", 3, seed()) as program:
        for _ in range(3):
            bench.freeze(program.pid)
            os.kill(program.pid, signal.SIGSTOP)
            bench.direct.absorb(program.pid)
            os.kill(program.pid, signal.SIGCONT)
            bench.thaw(program.pid)
            assert bench.direct.last(program.pid).path == "own"
            bench.freeze(program.pid)
            bench.direct.restore(program.pid, {"GPU-a": "GPU-b"})
            bench.direct.unlock(program.pid)
            assert bench.direct.last(program.pid).path == "own"
            program.runs_on()


def test_a_mover_killed_at_any_moment_loses_nothing_of_it(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed())
    with start(standin, tmp_path, "random", 3, rng.randrange(10**6)) as program:
        bench.freeze(program.pid)
        assert bench.direct.last(program.pid).path == "direct"
        bench.thaw(program.pid)
        for _ in range(8):
            for move in (bench.freeze, bench.thaw):
                killer = threading.Timer(rng.uniform(0, 0.05), kill_movers, [bench])
                killer.start()
                try:
                    move(program.pid)
                except errors.GpuschedError as error:
                    print(move.__name__, error)
                killer.join()
                if move == bench.thaw or bench.state(program.pid) == DriverState.RUNNING:
                    thaw_whatever(bench, program.pid)
            program.runs_on()


def test_vram_that_somebody_else_took_is_refused_and_tried_again(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with start(standin, tmp_path, "many", 8) as program:
        bench.freeze(program.pid)
        limit = tmp_path / "processes" / "vram"
        limit.write_text(str(5 * PAGE))
        with pytest.raises(errors.InsufficientGpuMemory, match="stays frozen"):
            bench.direct.restore(program.pid, None)
        program.stands_still()
        assert memory_files(program.pid) == 0
        limit.unlink()
        bench.thaw(program.pid)
        program.runs_on()


# -- what is shared -------------------------------------------------------------------------------


def test_what_a_program_has_shared_stays_and_the_rest_moves(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with start(standin, tmp_path, "exporting", 8) as program:
        assert len(pieces(program.pid)) == 6
        for keep_context in (False, True):
            bench.freeze(program.pid, keep_context=keep_context)
            assert bench.direct.last(program.pid).path == "direct"
            # Their handles, their mappings, and the descriptor that was given away.
            assert memory_files(program.pid) == 5
            bench.thaw(program.pid)
            program.runs_on()


def pieces(pid: int) -> list[int]:
    target = Target.find(pid)
    assert target is not None
    with target:
        return [piece.size_bytes for piece in target.pieces()]


def test_beside_memory_of_others_nothing_that_a_program_makes_itself_moves(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    """Among what it was given there may be objects that its own memory is bound to."""
    with start(standin, tmp_path, "importing", 8) as program:
        assert pieces(program.pid) == []
        (obstacle,) = bench.direct.obstacles([program.pid])
        assert (obstacle.kind, obstacle.certain) == ("ipc", False)
        bench.freeze(program.pid)
        assert bench.direct.last(program.pid).path == "driver"
        bench.thaw(program.pid)
        program.runs_on()


def test_what_cannot_be_shared_is_said_once_and_what_is_opened_is_an_obstacle(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with start(standin, tmp_path, "ipc", 2) as program:
        for wanted in ([True], [False]):
            wait_until(
                lambda: [bool(bench.direct.obstacles([program.pid]))] == wanted,  # noqa: B023
                within_s=10,
                what=f"a handle open: {wanted}",
            )
        bench.freeze(program.pid)
        bench.thaw(program.pid)
        program.runs_on()
        text = program.log.read_text()
        assert text.count("GPUSCHED_DIRECT=0") == text.count("gpusched:") == 1


def test_a_child_that_it_forked_does_not_matter(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with start(standin, tmp_path, "forking", 8) as program:
        for keep_context in (False, True):
            bench.freeze(program.pid, keep_context=keep_context)
            assert bench.direct.last(program.pid).path == "direct"
            bench.thaw(program.pid)
            program.runs_on()


def test_a_graph_that_is_being_captured_is_not_spoiled(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with start(standin, tmp_path, "capturing", 4) as program:
        for _ in range(10):
            time.sleep(random.uniform(0, 0.02))
            bench.freeze(program.pid)
            assert bench.direct.last(program.pid).path == "direct"
            bench.thaw(program.pid)
        program.runs_on()


def test_one_that_dies_in_any_phase_takes_nothing_with_it(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    for delay in (0.0, 0.01, 0.03):
        with start(standin, tmp_path, "random", 2, seed()) as program:
            killer = threading.Timer(delay, program.process.kill)
            killer.start()
            with pytest.raises((errors.GpuschedError, OSError)):
                while True:
                    bench.freeze(program.pid)
                    bench.thaw(program.pid)
            killer.join()
    bench.direct.forget_dead()
    assert bench.direct.pool.snapshots() == []


def test_many_pieces_are_few_slices(bench: Bench, tmp_path: Path) -> None:
    """A message to the mover has bounds."""
    taken = bench.direct.pool.take(1, 2, [(place, "GPU-a", PAGE) for place in range(100)])
    merged = mover_client._merged(list(taken.slices()))
    assert [size for _, _, size in merged] == [16 * MIB] * 12 + [8 * MIB]


# -- several devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_context", [False, True])
def test_two_devices_reach_each_others_memory_before_and_after(
    bench: Bench, standin: Path, tmp_path: Path, keep_context: bool
) -> None:
    with start(standin, tmp_path, "peers", 3, STANDIN_DEVICES="2") as program:
        assert len(pieces(program.pid)) == 12, "what was in the context that ended is gone"
        for _ in range(3):
            bench.freeze(program.pid, keep_context=keep_context)
            assert bench.direct.last(program.pid).path == "direct"
            assert memory_files(program.pid) == 0
            assert len(bench.direct.movers.all()) == 2
            bench.thaw(program.pid)
            program.runs_on()


def test_where_devices_cannot_reach_each_other_memory_is_the_drivers(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    env = {"STANDIN_DEVICES": "2", "STANDIN_NO_PEERS": "1"}
    with start(standin, tmp_path, "peers", 3, **env) as program:
        assert pieces(program.pid) == []
        bench.freeze(program.pid)
        bench.thaw(program.pid)
        program.runs_on()


# -- thousands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit", ["-n 1200", "-S -n 1200", pytest.param("", marks=pytest.mark.slow)]
)
def test_so_many_pieces_need_no_descriptor_each(
    bench: Bench, standin: Path, tmp_path: Path, limit: str
) -> None:
    """The stand-in has a descriptor for each by itself, so there is no room for as many again."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4000:
        pytest.skip("needs a hard limit of descriptors of 4000")
    (tmp_path / "processes" / "vram").write_text(str(4096 * MIB))
    with start(standin, tmp_path, "many", 700, limit=limit) as program:
        limits = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)
        for keep_context in (False, True):
            begun = time.monotonic()
            bench.freeze(program.pid, keep_context=keep_context)
            assert bench.direct.last(program.pid).path == "direct"
            middle = time.monotonic()
            bench.thaw(program.pid)
            print(f"{middle - begun:.2f} {time.monotonic() - middle:.2f}")
            program.runs_on()
            assert resource.prlimit(program.pid, resource.RLIMIT_NOFILE) == limits
