"""A program on simulated GPUs that does as it is told, and what tests ask of the simulated driver.

See also: ``simulated_fixtures.py``.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpusched import errors
from gpusched.mechanisms.sim import device
from gpusched.mechanisms.sim.driver import SimDriver
from gpusched.ports import DriverState
from gpusched.units import MIB

VRAM = 64 * MIB
DEADLINE_S = 20.0

#: A program that does as it is told, one JSON line at a time.
PROGRAM = """
import json, os, sys, threading, zlib
from gpusched.mechanisms.sim import device

buffers, loops = [], []
def alloc(size, number=0):
    buffers.append(device.init().allocate(size, number))
    return len(buffers) - 1
def fill(index, seed):
    step = 65536
    for at in range(0, buffers[index].size_bytes, step):
        buffers[index].write(at, (b"%016d" % (seed * 1000003 + at)) * (step // 16))
def digest():
    sums = []
    for buffer in buffers:
        with buffer.access() as view:
            sums.append(zlib.crc32(view))
    return sums
def hold():
    "Stays inside one call until the next line arrives."
    with buffers[0].access():
        print(json.dumps("inside"), flush=True)
        sys.stdin.readline()
    return "outside"
def spin(threads):
    "Calls without pause from several threads, for ever; anything wrong ends the process."
    expected = digest()
    def loop():
        while True:
            if digest() != expected:
                os._exit(99)
            count[0] += 1
    count = [0]
    loops.append(count)
    for _ in range(threads):
        threading.Thread(target=loop, daemon=True).start()
def spun():
    return loops[0][0]
def fork():
    pid = os.fork()
    if pid == 0:
        try:
            digest()
            told = "worked"
        except device.NotForkSafe as error:
            told = str(error)
        try:
            device.init()
        except device.NotForkSafe:
            told = "refused: " + told
        sys.stdout.write(json.dumps(told) + chr(10))
        sys.stdout.flush()
        sys.stdin.readline()
        os._exit(0)
    os.waitpid(pid, 0)
    return "parent goes on"
def again():
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
def become(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
def free(index):
    buffers.pop(index).free()
def info(number=0):
    return device.init().mem_get_info(number)
print(json.dumps("up"), flush=True)
while line := sys.stdin.readline():
    name, *arguments = json.loads(line)
    try:
        answer = globals()[name](*arguments)
    except device.SimError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Program:
    """A running ``PROGRAM``; ``tell`` waits for its answer, ``send`` and ``answer`` are the two halves."""

    def __init__(self, directory: Path, visible: str | None = None) -> None:
        env = {
            "PATH": os.environ["PATH"],
            "GPUSCHED_SIM_DIR": str(directory),
            "PYTHONPATH": str(Path(device.__file__).parents[3]),
        }
        if visible is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd="/",
        )
        self.pid = self.process.pid
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.answer() == "up"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)

    def send(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        return json.loads(self._answers.get(timeout=DEADLINE_S))

    def is_silent(self, seconds: float) -> bool:
        try:
            self._answers.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def tell(self, *command: Any) -> Any:
        self.send(*command)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


Start = Callable[..., Program]


def loaded(start: Start, size: int = 8 * MIB, seed: int = 1, visible: str | None = None) -> Program:
    program = start(visible)
    assert program.tell("alloc", size) == 0
    program.tell("fill", 0, seed)
    return program


def freeze(sim: SimDriver, pid: int) -> None:
    sim.lock(pid, 5.0)
    sim.checkpoint(pid)


def thaw(sim: SimDriver, pid: int, gpu_map: dict[str, str] | None = None) -> None:
    sim.restore(pid, gpu_map)
    sim.unlock(pid)


def state(sim: SimDriver, pid: int) -> DriverState:
    return sim.states([pid])[pid]


def uuids(sim: SimDriver) -> list[str]:
    return [gpu.uuid for gpu in sim.describe().gpus]


def used(sim: SimDriver) -> list[int]:
    usage = sim.usage()
    return [usage.gpus[uuid].used_bytes for uuid in uuids(sim)]


def disk_bytes(path: Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def failure(call: Callable[[], object]) -> errors.DriverError:
    with pytest.raises(errors.DriverError) as raised:
        call()
    return raised.value


def start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def other_driver(directory: Path, call: str) -> subprocess.Popen[bytes]:
    """A process of its own that makes one driver call."""
    code = (
        "import sys; from pathlib import Path; from gpusched.mechanisms.sim.driver import SimDriver; "
        f"SimDriver(Path(sys.argv[1])).{call}"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(directory)])


def bring_back(sim: SimDriver, pid: int) -> None:
    if state(sim, pid) is DriverState.CHECKPOINTED:
        sim.restore(pid, None)
    if state(sim, pid) is DriverState.LOCKED:
        sim.unlock(pid)
    assert state(sim, pid) is DriverState.RUNNING
