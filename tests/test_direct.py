"""VRAM past the driver, against a stand-in driver: the gate, the hand-over, the pool, and who dies in the middle."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import preload_cost
import standin_cuda
from direct_bench import Bench, kill_movers, mapped, memory_files, off, phase, thaw_whatever
from gpusched import errors
from gpusched.mechanisms.cuda import direct, pool
from gpusched.mechanisms.cuda.mover_client import Mover
from gpusched.mechanisms.cuda.pool import Pool
from gpusched.mechanisms.cuda.target import Operation, Phase, Refused, Target
from gpusched.ports import DriverState
from gpusched.units import MIB
from standin_cuda import Program

pytest_plugins = ["direct_fixtures"]
pytestmark = pytest.mark.skipif(standin_cuda.compiler() is None, reason="needs a C compiler")


@pytest.fixture
def program(standin: Path, tmp_path: Path) -> Iterator[Program]:
    with Program(standin, tmp_path / "program.log", 8, 2) as started:
        yield started


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_context", [False, True])
def test_contents_leave_and_come_back_at_any_moment(
    bench: Bench, program: Program, keep_context: bool
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(10):
        time.sleep(rng.uniform(0, 0.05))
        bench.freeze(program.pid, keep_context=keep_context)
        assert bench.state(program.pid) == off(keep_context)
        assert bench.direct.last(program.pid).path == "direct"
        bench.thaw(program.pid)
        assert bench.state(program.pid) == DriverState.RUNNING
    program.runs_on()
    assert bench.direct.pool.snapshots() == []


def test_a_context_that_was_kept_can_go_later(bench: Bench, program: Program) -> None:
    for _ in range(2):
        bench.freeze(program.pid, keep_context=True)
        assert bench.driver.states([program.pid])[program.pid] == DriverState.RUNNING
        bench.begin()
        bench.direct.checkpoint(program.pid, keep_context=True)
        assert bench.state(program.pid) == DriverState.PARKED
        bench.direct.checkpoint(program.pid)
        assert bench.state(program.pid) == DriverState.CHECKPOINTED
        program.stands_still()
        bench.thaw(program.pid)
        program.runs_on()


def test_a_context_that_cannot_go_stays_and_nothing_is_lost(bench: Bench, program: Program) -> None:
    for call in ("lock", "checkpoint"):
        bench.freeze(program.pid, keep_context=True)
        bench.driver.fails = call
        with pytest.raises(errors.DriverError, match=f"{call} fails"):
            bench.direct.checkpoint(program.pid)
        bench.driver.fails = ""
        assert bench.state(program.pid) == DriverState.PARKED
        if call == "checkpoint":  # the driver's lock is there from the first try
            bench.direct.checkpoint(program.pid)
            assert bench.state(program.pid) == DriverState.CHECKPOINTED
        bench.thaw(program.pid)
        program.runs_on()


def test_what_has_its_context_on_the_gpu_is_not_saved(bench: Bench, program: Program) -> None:
    bench.freeze(program.pid, keep_context=True)
    with pytest.raises(errors.DriverError, match="on the GPU still"):
        bench.direct.absorb(program.pid)
    bench.thaw(program.pid)
    program.runs_on()


def test_nothing_of_it_is_left_on_the_device(bench: Bench, program: Program) -> None:
    assert memory_files(program.pid) > 0
    bench.freeze(program.pid)
    program.stands_still()
    assert memory_files(program.pid) == 0
    assert sum(memory_files(mover.pid or 0) for mover in bench.direct.movers.all()) == 0
    bench.thaw(program.pid)
    program.runs_on()


def test_contents_that_a_process_has_absorbed_come_back_from_there(
    bench: Bench, program: Program
) -> None:
    for _ in range(2):
        bench.freeze(program.pid)
        os.kill(program.pid, signal.SIGSTOP)
        bench.direct.absorb(program.pid)
        assert bench.direct.pool.snapshots() == []
        bench.direct.absorb(program.pid)  # there is nothing more to do
        os.kill(program.pid, signal.SIGCONT)
        bench.thaw(program.pid)
        assert bench.direct.last(program.pid).path == "own"
        program.runs_on()


def test_what_was_half_absorbed_is_absorbed_and_comes_back(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Target.write

    def fail_late(target: Target, offset: int, data: bytes) -> None:
        if offset > 0:
            raise errors.DriverError("no")
        write(target, offset, data)

    bench.freeze(program.pid)
    with monkeypatch.context() as patched:
        patched.setattr(Target, "write", fail_late)
        with pytest.raises(errors.DriverError):
            bench.direct.absorb(program.pid)
    bench.begin()
    bench.thaw(program.pid)
    program.runs_on()


def test_what_is_closed_is_opened_again_without_having_left(bench: Bench, program: Program) -> None:
    bench.direct.lock(program.pid, 5.0)
    assert bench.state(program.pid) == DriverState.LOCKED
    program.stands_still()
    bench.direct.unlock(program.pid)
    program.runs_on()


# -- what it falls back from ----------------------------------------------------------------------


def test_a_pool_without_room_leaves_it_to_the_driver(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_available_bytes", lambda: 0)
    bench.freeze(program.pid)
    assert bench.state(program.pid) == DriverState.CHECKPOINTED
    assert bench.direct.last(program.pid).path == "driver"
    assert phase(program.pid) == Phase.CLOSED
    bench.thaw(program.pid)
    program.runs_on()


def test_a_mover_that_cannot_start_leaves_it_to_the_driver(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpusched.mechanisms.cuda.mover_client._MOVER", ["false"])
    bench.freeze(program.pid)
    assert bench.direct.last(program.pid).path == "driver"
    bench.thaw(program.pid)
    program.runs_on()


def test_what_was_handed_out_in_vain_is_let_go_before_the_drivers_own_copy(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_mover: Mover, *, out: bool) -> None:
        raise errors.DriverError(f"no copy, out={out}")

    bench.freeze(program.pid)
    bench.thaw(program.pid)
    with monkeypatch.context() as patched:
        patched.setattr(Mover, "go", fail)
        bench.freeze(program.pid)
    assert bench.direct.last(program.pid).path == "driver"
    target = Target.find(program.pid)
    assert target is not None
    with target:
        assert all(not fds for _, fds in target.held())
    bench.thaw(program.pid)
    program.runs_on()


@pytest.mark.parametrize("keep_context", [False, True])
def test_a_process_that_has_no_room_to_park_goes_the_drivers_way(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch, keep_context: bool
) -> None:
    def has_no_room(_target: Target) -> None:
        raise Refused(Operation.PARK, -errno.ENOMEM)

    with monkeypatch.context() as patched:
        patched.setattr(Target, "park", has_no_room)
        bench.freeze(program.pid, keep_context=keep_context)
    assert bench.state(program.pid) == DriverState.CHECKPOINTED
    assert bench.direct.last(program.pid).path == "driver"
    assert bench.direct.pool.snapshots() == []
    bench.thaw(program.pid)
    program.runs_on()


def test_chunks_are_nobody_elses_while_a_mover_may_copy_into_them(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []
    release = Pool.release

    def note(pool: Pool, pid: int, ticks: int) -> None:
        alive.extend(mover.pid is not None for mover in bench.direct.movers.all())
        release(pool, pid, ticks)

    def fail(_mover: Mover, _size_bytes: int) -> None:
        raise errors.DriverError("the copy does not end")

    bench.freeze(program.pid)
    bench.thaw(program.pid)
    with monkeypatch.context() as patched:
        patched.setattr(Mover, "finish", fail)
        patched.setattr(Pool, "release", note)
        bench.freeze(program.pid, keep_context=True)
    assert alive == [False]
    assert bench.direct.last(program.pid).path == "driver"
    bench.thaw(program.pid)
    program.runs_on()


@pytest.mark.parametrize("at", ["let_go", "copy"])
def test_what_an_interrupted_freeze_has_left_on_the_gpu_goes_with_the_next(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def fail(*_: object) -> None:
        raise errors.DriverError("interrupted")

    bench.freeze(program.pid)
    bench.thaw(program.pid)
    with monkeypatch.context() as patched:
        owner: type = Target if at == "let_go" else Mover
        patched.setattr(owner, "drop" if at == "let_go" else "finish", fail)
        with pytest.raises(errors.DriverError, match="interrupted"):
            bench.freeze(program.pid)
    assert bench.driver.states([program.pid])[program.pid] == DriverState.CHECKPOINTED
    bench.begin()
    assert bench.state(program.pid) == DriverState.PARKED, "it holds its memory still"
    assert memory_files(program.pid) > 0
    with pytest.raises(errors.DriverError, match="on the GPU still"):
        bench.direct.absorb(program.pid)
    bench.direct.checkpoint(program.pid)
    assert bench.state(program.pid) == DriverState.CHECKPOINTED
    assert memory_files(program.pid) == 0
    bench.thaw(program.pid)
    program.runs_on()


def test_what_the_driver_alone_can_move_does_not_stay_with_the_context(
    bench: Bench, program: Program
) -> None:
    bench.driver.held = {program.pid: {"GPU-a": 3 << 30}}
    bench.freeze(program.pid, keep_context=True)
    assert bench.state(program.pid) == DriverState.CHECKPOINTED
    bench.thaw(program.pid)
    bench.driver.held = {program.pid: {"GPU-a": 600 << 20}}
    bench.freeze(program.pid, keep_context=True)
    assert bench.state(program.pid) == DriverState.PARKED
    bench.thaw(program.pid)
    program.runs_on()


def test_a_thread_that_stays_in_the_driver_opens_the_gate_again(
    bench: Bench, standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_GATE_S", 0.2)
    with Program(standin, tmp_path / "log", 2, 1, PROGRAM_SLEEP_US="3000000") as program:
        with pytest.raises(errors.LockTimeout):
            bench.direct.lock(program.pid, 0.5)
        assert bench.state(program.pid) == DriverState.RUNNING
        program.runs_on()


def test_a_program_that_does_not_want_it_goes_the_drivers_way(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with Program(standin, tmp_path / "log", 2, GPUSCHED_DIRECT="0") as program:
        assert Target.find(program.pid) is None
        bench.freeze(program.pid)
        assert bench.direct.last(program.pid).path == "driver"
        bench.thaw(program.pid)
        program.runs_on()


# -- who dies -------------------------------------------------------------------------------------


def test_a_new_helper_goes_on_from_every_phase(bench: Bench, program: Program) -> None:
    for keep_context in (False, True):
        bench.direct.lock(program.pid, 5.0)
        bench.begin()
        assert bench.state(program.pid) == DriverState.LOCKED
        bench.direct.checkpoint(program.pid, keep_context=keep_context)
        bench.begin()
        assert bench.state(program.pid) == off(keep_context)
        bench.direct.restore(program.pid, None)
        bench.begin()
        assert bench.state(program.pid) == DriverState.LOCKED
        bench.direct.unlock(program.pid)
        program.runs_on()


def test_what_was_mapped_before_its_contents_came_is_filled_or_tried_again(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **_given: object) -> None:
        raise errors.DriverError("the copy does not end")

    def is_mapped_and_fails(_mover: Mover, _size_bytes: int) -> None:
        seen.append((phase(program.pid), mapped(program.pid) > 0))
        raise errors.DriverError("the copy does not end")

    def is_too_old(_target: Target) -> None:
        raise Refused(Operation.MAP, -errno.EINVAL)

    seen: list[tuple[Phase | None, bool]] = []
    bench.freeze(program.pid)
    with monkeypatch.context() as patched:
        patched.setattr(Mover, "finish", is_mapped_and_fails)
        bench.thaw(program.pid)  # its own contents go there
    assert seen == [(Phase.PARKED, True)]
    assert bench.direct.last(program.pid).path == "own"
    program.runs_on()

    bench.freeze(program.pid)
    with monkeypatch.context() as patched:
        patched.setattr(Mover, "finish", fail)
        patched.setattr(Target, "attach", fail)
        with pytest.raises(errors.DriverError, match="does not end"):
            bench.thaw(program.pid)
    assert phase(program.pid) == Phase.PARKED
    assert memory_files(program.pid) > 0
    bench.begin()
    bench.direct.checkpoint(program.pid)
    assert memory_files(program.pid) == 0, "what has no contents is not saved"
    bench.thaw(program.pid)
    program.runs_on()

    bench.freeze(program.pid)
    with monkeypatch.context() as patched:
        patched.setattr(Target, "map", is_too_old)
        bench.thaw(program.pid)
    assert bench.direct.last(program.pid).path == "direct"
    program.runs_on()


def test_a_mover_killed_at_any_moment_loses_nothing(bench: Bench, program: Program) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    bench.freeze(program.pid)
    bench.thaw(program.pid)
    for _ in range(12):
        killer = threading.Timer(rng.uniform(0, 0.05), kill_movers, [bench])
        killer.start()
        try:
            bench.freeze(program.pid)
        except errors.GpuschedError as error:
            print("freeze:", error)
        killer.join()
        thaw_whatever(bench, program.pid)
        killer = threading.Timer(rng.uniform(0, 0.05), kill_movers, [bench])
        bench.freeze(program.pid)
        killer.start()
        try:
            bench.thaw(program.pid)
        except errors.GpuschedError as error:
            print("thaw:", error)
        killer.join()
        thaw_whatever(bench, program.pid)
        program.runs_on()


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
def test_a_driver_that_fails_leaves_a_state_to_go_on_from(
    bench: Bench, program: Program, call: str
) -> None:
    bench.driver.fails = call
    with pytest.raises(errors.DriverError, match=f"{call} fails"):
        bench.freeze(program.pid)
        bench.thaw(program.pid)
    bench.driver.fails = ""
    thaw_whatever(bench, program.pid)
    program.runs_on()


def test_a_process_that_dies_in_any_phase_takes_nothing_with_it(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    for number, delay in enumerate((0.0, 0.005, 0.01, 0.02)):
        with Program(standin, tmp_path / f"log{number}", 8) as program:
            killer = threading.Timer(delay, program.process.kill)
            killer.start()
            with pytest.raises((errors.GpuschedError, OSError)):
                while True:
                    bench.freeze(program.pid)
                    bench.thaw(program.pid)
            killer.join()
    bench.direct.forget_dead()
    assert bench.direct.pool.snapshots() == []


def test_memory_that_somebody_else_took_is_refused_and_tried_again(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    with Program(standin, tmp_path / "log", 8) as program:
        bench.freeze(program.pid)
        limit = tmp_path / "processes" / "vram"
        limit.write_text(str(8 * MIB))
        with pytest.raises(errors.InsufficientGpuMemory, match="stays frozen"):
            bench.direct.restore(program.pid, None)
        assert bench.state(program.pid) == DriverState.PARKED, "its context had come back by then"
        program.stands_still()
        assert memory_files(program.pid) == 0
        bench.direct.checkpoint(program.pid)  # as the engine takes it back
        assert bench.state(program.pid) == DriverState.CHECKPOINTED
        limit.unlink()
        bench.thaw(program.pid)
        program.runs_on()


def test_a_process_that_cannot_be_reached_is_not_left_to_the_driver_alone(
    bench: Bench, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is parked: with the context alone back it would read what is not there."""
    bench.freeze(program.pid)
    with monkeypatch.context() as patched:
        patched.setattr("gpusched.mechanisms.cuda.target._VERSION", 2)
        with pytest.raises(errors.DriverError, match="another library"):
            bench.direct.restore(program.pid, None)
        assert bench.driver.states([program.pid])[program.pid] == DriverState.CHECKPOINTED
    with monkeypatch.context() as patched:
        patched.setattr("gpusched.mechanisms.cuda.target._getfd", out_of_descriptors)
        with pytest.raises(errors.DriverError, match="cannot be looked into"):
            bench.direct.restore(program.pid, None)
    bench.thaw(program.pid)
    program.runs_on()


def out_of_descriptors(_pidfd: int, _number: int) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_to_another_gpu_the_process_goes_by_itself(bench: Bench, program: Program) -> None:
    bench.freeze(program.pid)
    bench.direct.restore(program.pid, {"GPU-a": "GPU-b"})
    bench.direct.unlock(program.pid)
    assert bench.direct.last(program.pid).path == "own"
    program.runs_on()


# -- strangers ------------------------------------------------------------------------------------

LIAR = """
import ctypes, mmap, os, socket, struct, sys
fd = os.memfd_create("gpusched-direct")
os.ftruncate(fd, 48)
page = mmap.mmap(fd, 48)
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
page[:24] = struct.pack("<6I", 0x47534431, 1, theirs.fileno(), ours.fileno(), 0, 0)
print("ready", flush=True)
while True:
    _, sequence, operation, _, first = struct.unpack("<4IQ", ours.recv(64))
    MODE
"""
LIES = {
    "silence": "pass",
    "nonsense": "ours.send(b'x' * 100)",
    "an endless table": "ours.send(struct.pack('<2IiIIIQQ', 0x47534431, sequence, 0, 0, 0, 0, first + 1, 1 << 40))",
    "circles": "ours.send(struct.pack('<2IiIIIQQ', 0x47534431, sequence, 0, 0, 0, 0, 0, 9))",
    "a huge piece": "ours.send(struct.pack('<2IiIIIQQ3Q16s', 0x47534431, sequence, 0, 1, 0, 0, 1, 1,"
    " 0, 4096, 1 << 60, b''))",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_process_that_lies_costs_an_error_and_little_time(
    bench: Bench, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpusched.mechanisms.cuda.target._LOOK_S", 0.3)
    code = LIAR.replace("MODE", LIES[lie])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as liar:
        assert liar.stdout is not None
        liar.stdout.readline()
        (tmp_path / "processes" / str(liar.pid)).write_bytes(bytes(8))
        begun = time.monotonic()
        bench.freeze(liar.pid)  # the driver's way
        assert bench.direct.last(liar.pid).path == "driver"
        assert time.monotonic() - begun < 5
        bench.thaw(liar.pid)
        liar.kill()


def test_descriptors_that_are_no_memory_are_an_error_of_the_mover(
    bench: Bench, program: Program
) -> None:
    """A file, a directory or a socket instead of memory: the process goes on, by the driver's way."""
    taken = bench.direct.pool.take(program.pid, 0, [(0, "", 4 * MIB)])
    with (
        Path("/etc/passwd").open() as file,
        bench.direct.movers.of("GPU-5a5a5a5a-5a5a-5a5a-5a5a-5a5a5a5a5a5a").job(taken) as mover,
        pytest.raises(errors.DriverError, match="cuMemImportFromShareableHandle"),
    ):
        mover.take(list(taken.slices()), [file.fileno()])
    bench.freeze(program.pid)
    bench.thaw(program.pid)
    program.runs_on()


# -- the library ----------------------------------------------------------------------------------

NEXT = """
#define _GNU_SOURCE
#include <dlfcn.h>
int which(void) { int (*next)(void) = (int (*)(void))dlsym(RTLD_NEXT, "which"); return next ? 10 * next() + 1 : 1; }
"""


def test_rtld_next_means_what_it_meant(standin: Path, tmp_path: Path) -> None:
    """Of two libraries with one name, the first finds the second's: who asks is seen by where it returns to."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.c").write_text(NEXT)
        command = [str(standin_cuda.compiler()), "-O2", "-fPIC", "-shared"]
        command += ["-o", str(tmp_path / f"lib{name}.so"), str(tmp_path / f"{name}.c"), "-ldl"]
        subprocess.run(command, check=True)
    code = "import ctypes; print(ctypes.CDLL(None).which())"
    preload = f"{standin / 'libdirect.so'}:{tmp_path / 'liba.so'}:{tmp_path / 'libb.so'}"
    env = os.environ | {"LD_PRELOAD": preload}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "11"


@pytest.mark.root
def test_a_set_uid_program_does_not_load_it(standin: Path, tmp_path: Path) -> None:
    """The dynamic linker's word, on which the preload rests."""
    env = os.environ | {"LD_PRELOAD": str(standin / "libdirect.so")}
    program = tmp_path / "cat"
    shutil.copy("/bin/cat", program)

    def read(path: str) -> str:
        return subprocess.run(
            [program, path], env=env, capture_output=True, text=True, check=True, timeout=30
        ).stdout

    assert "libdirect.so" in read("/proc/self/maps")
    os.chown(program, 65534, 65534)
    program.chmod(0o4755)
    if "Uid:\t0\t65534" not in read("/proc/self/status"):
        pytest.skip("set-uid programs do not work in this directory")
    assert "libdirect.so" not in read("/proc/self/maps")


def test_the_benchmark_of_its_cost_compares_it_with_the_driver_in_one_process(
    standin: Path, tmp_path: Path
) -> None:
    program = tmp_path / "preload_cost"
    preload_cost.build(program)
    found = preload_cost.once(program, str(standin / "libdirect.so"), turns=2)
    assert {"launch", "alloc 512 MiB"} < set(found)
    assert all(
        len(times) == 2 and min(times) > 0 for loop in found.values() for times in loop.values()
    )
    with pytest.raises(subprocess.CalledProcessError):  # nothing to compare
        preload_cost.once(program, "", turns=2)


LINKED = """
#include <stdio.h>
#include <unistd.h>
#include <string.h>
typedef unsigned long long Ptr;
int cuInit(unsigned), cuDevicePrimaryCtxRetain(void **, int), cuCtxSetCurrent(void *), cuMemAlloc_v2(Ptr *, size_t);
int cuMemsetD8_v2(Ptr, unsigned char, size_t), cuMemcpyDtoHAsync_v2(void *, Ptr, size_t, void *);
int main(void) {
    void *context; Ptr memory; static unsigned char here[1 << 16]; unsigned step = 0;
    if (cuInit(0) || cuDevicePrimaryCtxRetain(&context, 0) || cuCtxSetCurrent(context))
        return 1;
    if (cuMemAlloc_v2(&memory, 4 << 20))
        return 1;
    for (;;) {
        step++;
        if (cuMemsetD8_v2(memory, (unsigned char)step, sizeof here))
            return 2;
        if (cuMemcpyDtoHAsync_v2(here, memory, sizeof here, 0))
            return 2;
        if (here[0] != (unsigned char)step || here[sizeof here - 1] != (unsigned char)step)
            printf("WRONG at step %u\\n", step);
        if (step % 100 == 0) printf("step %u\\n", step);
        fflush(stdout);
    }
}
"""


def test_a_program_that_links_to_the_driver_is_held_and_moved_too(
    bench: Bench, standin: Path, tmp_path: Path
) -> None:
    (tmp_path / "linked.c").write_text(LINKED)
    command = [str(standin_cuda.compiler()), "-O2", "-o", str(tmp_path / "linked")]
    command += [str(tmp_path / "linked.c"), str(standin / "libcuda.so.1")]
    subprocess.run(command, check=True)
    with Program(standin, tmp_path / "log", command=[str(tmp_path / "linked")]) as program:
        for keep_context in (False, True, False):
            bench.freeze(program.pid, keep_context=keep_context)
            assert bench.direct.last(program.pid).path == "direct"
            program.stands_still()
            bench.thaw(program.pid)
            program.runs_on()


def test_a_child_of_a_fork_has_none_of_it(standin: Path, tmp_path: Path) -> None:
    code = """
import ctypes, os, sys, time
cuda = ctypes.CDLL("libcuda.so.1")
assert cuda.cuInit(0) == 0
if os.fork():
    os.wait()
else:
    print(os.getpid(), flush=True)
    time.sleep(60)
"""
    env = os.environ | {"LD_PRELOAD": str(standin / "libdirect.so")}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Target.find(child) is None
        found = Target.find(parent.pid)
        assert found is not None
        with found:
            found.close_gate(2.0)
            found.open_gate()
        os.kill(child, signal.SIGKILL)


# -- pages for the driver's own copy --------------------------------------------------------------

POPULATED = """
import ctypes, mmap, re, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
size = (128 << 20) + 12345
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | int(sys.argv[1])
found = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
ctypes.memset(found + size - 1, 7, 1)
huge = here = 0
for line in open("/proc/self/smaps"):
    if re.match("[0-9a-f]+-", line):
        start, end = (int(each, 16) for each in line.split()[0].split("-"))
        here = start < found + size and end > found
    elif here and line.startswith("AnonHugePages"):
        huge += int(line.split()[1])
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
assert libc.munmap(found, size) == 0
assert f"{found:x}-" not in open("/proc/self/maps").read()
print(found % (2 << 20) == 0, huge // 1024)
"""


@pytest.mark.parametrize(
    ("flags", "wish", "is_huge"),
    [(0x8000, "1", True), (0x8000, "0", False), (0, "1", False)],
    ids=["populated", "switched off", "not populated"],
)
def test_what_the_driver_populates_at_once_has_huge_pages(
    standin: Path, flags: int, wish: str, is_huge: bool
) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this machine gives nobody huge pages")
    ended = subprocess.run(
        [sys.executable, "-c", POPULATED, str(flags)],
        env=os.environ | {"LD_PRELOAD": str(standin / "libdirect.so"), "GPUSCHED_DIRECT": wish},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    is_aligned, huge_mb = ended.stdout.split()
    if is_huge:
        assert is_aligned == "True" and int(huge_mb) > 64
    elif "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert int(huge_mb) == 0
