"""CRIU killed at the very moments at which a process runs CRIU's code: it goes on as if nothing had been."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import ROOT, wait_until
from gpusched import errors
from gpusched.mechanisms.criu import run, threads
from gpusched.mechanisms.criu import tree as trees
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside
from gpusched.mechanisms.criu.program import Program
from isolated import PYTHON, SAVER, Isolated, bring_back, counting, isolated, save

pytestmark = [
    pytest.mark.criu,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64"),
]

#: Counts on as long as its child and all of its threads do. With a second argument it has a handler for SIGTRAP.
FAMILY = """
import os, signal, sys, threading, time
if sys.argv[1:]:
    signal.signal(signal.SIGTRAP, lambda *_: print(0, "trapped", flush=True))
beats, (read_end, write_end) = [0, 0, 0], os.pipe()
def beat(which):
    while True:
        beats[which] += 1
        time.sleep(0.001)
for which in range(3):
    threading.Thread(target=beat, args=(which,), daemon=True).start()
if os.fork() == 0:
    while True:
        os.write(write_end, b".")
        time.sleep(0.002)
count = 0
while True:
    before = list(beats)
    os.read(read_end, 2)
    while any(now == was for now, was in zip(beats, before)):
        time.sleep(0.001)
    count += 1
    print(count, flush=True)
"""
#: Whoever makes the call rt_sigaction is killed by the kernel from now on.
FILTERED = """
import ctypes, struct, time
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 13), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7fff0000)]
program = b"".join(struct.pack("=HBBI", *line) for line in code)
buffer = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(buffer)))) == 0
count = 0
while True:
    count += 1
    print(count, flush=True)
    time.sleep(0.005)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    store = ImageStore(tmp_path / "images")
    yield store
    store.close()


class Killed:
    """A CRIU that dies after the N-th of those calls; ``seen`` is how many the last one made."""

    def __init__(self, criu: Program, directory: Path) -> None:
        self._file = directory / "at"
        wrapper = directory / "criu"
        killer = f"{os.path.realpath(sys.executable)} -I -S {ROOT}/tests/criu_killer.py"
        wrapper.write_text(f'#!/bin/sh\nexec {killer} {self._file} "{criu.path}" "$@"\n')
        wrapper.chmod(0o755)
        self.program = Program(path=str(wrapper), version=criu.version, executable=criu.executable)

    def at(self, number: int) -> Program:
        self._file.write_text(str(number))
        return self.program

    @property
    def seen(self) -> int:
        return int(Path(f"{self._file}.seen").read_text())


def test_killed_whenever_a_process_runs_its_code_criu_takes_nobody_along(
    tmp_path: Path, store: ImageStore, criu: Program, soak: bool
) -> None:
    killed = Killed(criu, tmp_path)
    argv = [*PYTHON, "-c", FAMILY, "handler"]
    with isolated(tmp_path / "log", argv) as tree, Inside(tree.init) as inside:
        wait_until(lambda: len(inside.tasks()) == 2, within_s=10, what="both are there")
        tree.wait_for_more()
        save(killed.at(0), tree, store)
        store.delete("a")
        run.resume(inside.tasks())
        points = killed.seen
        before = [_signals(task.pid) for task in inside.tasks()]
        assert points > 30
        for number in range(1, points + 1, 1 if soak else 4):
            with pytest.raises(errors.CriuError, match="ended by signal 9"):
                save(killed.at(number), tree, store)
            tree.wait_for_more(2)
            assert [_signals(task.pid) for task in inside.tasks()] == before, number
        assert run.find_running_criu(criu, inside) == []
        _require_its_own_handler(tree, inside)
        save(killed.at(0), tree, store)  # nothing that was left behind is in the way
    with isolated(tmp_path / "log2") as tree:
        bring_back(criu, tree, store, tmp_path / "log")
        tree.wait_for_more()


def _signals(pid: int) -> list[str]:
    """What is pending, blocked, ignored and caught, of every thread."""
    return [
        line
        for status in sorted(Path(f"/proc/{pid}/task").glob("*/status"))
        for line in status.read_text().splitlines()
        if line.startswith(("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"))
    ]


def _require_its_own_handler(tree: Isolated, inside: Inside) -> None:
    os.kill(inside.tasks()[0].pid, signal.SIGTRAP)
    wait_until(lambda: tree.sums() == {"trapped"}, within_s=10, what="its own handler runs")
    tree.wait_for_more()


def test_what_came_back_has_its_own_handler_of_the_trap(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with isolated(tmp_path / "log", [*PYTHON, "-c", FAMILY, "handler"]) as tree:
        tree.wait_for_more()
        save(criu, tree, store)
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        bring_back(criu, tree, store, tmp_path / "log")
        tree.wait_for_more()
        _require_its_own_handler(tree, inside)


def test_a_trap_ends_what_came_back_as_it_would_have_before(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with counting(tmp_path / "log") as tree, Inside(tree.init) as inside:
        before = _signals(inside.tasks()[0].pid)
        save(criu, tree, store)
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        back = bring_back(criu, tree, store, tmp_path / "log")
        tree.wait_for_more()
        assert _signals(back.main.pid) == before
        os.kill(back.main.pid, signal.SIGTRAP)
        wait_until(lambda: not inside.tasks(), within_s=10, what="it ends")


def test_a_process_that_may_not_ask_for_signals_is_saved_all_the_same(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with isolated(tmp_path / "log", [*PYTHON, "-c", FILTERED]) as tree, Inside(tree.init) as inside:
        tree.wait_for_more()
        save(criu, tree, store)
        run.resume(inside.tasks())
        tree.wait_for_more()
    with isolated(tmp_path / "log2") as tree:
        bring_back(criu, tree, store, tmp_path / "log")
        tree.wait_for_more()


#: Saves as a daemon would, and dies at the N-th of the steps that it has other processes make.
DYING = (
    """
import os, sys
from gpusched.mechanisms.criu import tracing
real, left = tracing._to_next_stop, [int(sys.argv.pop())]
def step(tid):
    real(tid)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)
tracing._to_next_stop = step
"""
    + SAVER
)


@pytest.mark.parametrize("step", range(1, 13))
def test_a_daemon_that_dies_while_a_process_makes_a_call_for_it_leaves_that_as_it_was(
    step: int, tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with (
        isolated(tmp_path / "log", [*PYTHON, "-c", FAMILY, "handler"]) as tree,
        Inside(tree.init) as inside,
    ):
        wait_until(lambda: len(inside.tasks()) == 2, within_s=10, what="both are there")
        tree.wait_for_more()
        before = [_signals(task.pid) for task in inside.tasks()]
        argv = [criu.path, criu.executable, tree.init.pid, tree.init.start_ticks, store.root, step]
        ended = subprocess.run(
            [sys.executable, "-c", DYING, *map(str, argv)], cwd=ROOT, timeout=60, check=False
        )
        assert ended.returncode == -signal.SIGKILL
        trees.recover(criu, inside, store, "a")
        tree.wait_for_more()
        assert [_signals(task.pid) for task in inside.tasks()] == before
        _require_its_own_handler(tree, inside)


def test_a_signal_from_the_broken_connection_to_criu_ends_nobody(
    tmp_path: Path, criu: Program
) -> None:
    script = "import signal, time\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\nn = 0\n"
    script += "while True:\n    n += 1\n    print(n, flush=True)\n    time.sleep(0.005)"
    with (
        isolated(tmp_path / "log", [*PYTHON, "-c", script]) as tree,
        Inside(tree.init) as inside,
    ):
        tree.wait_for_more()
        (task,) = inside.tasks()
        before = _signals(task.pid)
        captured = threads.stop_and_capture(inside, threads.note(inside))
        captured = threads.ask_traps(captured)
        threads.arm(captured)
        os.kill(task.pid, signal.SIGPIPE)
        run.undo_dump(inside, captured)
        tree.wait_for_more()
        assert _signals(task.pid) == before


def test_who_stops_only_a_moment_after_criu_has_died_is_put_back_too(
    tmp_path: Path, criu: Program
) -> None:
    with counting(tmp_path / "log") as tree, Inside(tree.init) as inside:
        (task,) = inside.tasks()
        before = _signals(task.pid)
        captured = threads.stop_and_capture(inside, threads.note(inside))
        captured = threads.ask_traps(captured)
        threads.arm(captured)
        os.kill(task.pid, signal.SIGCONT)
        wait_until(lambda: not inside.tasks()[0].is_stopped, within_s=5, what="it runs")
        stopper = threading.Timer(0.1, os.kill, (task.pid, signal.SIGSTOP))
        stopper.start()
        run.undo_dump(inside, captured)
        stopper.join()
        tree.wait_for_more()
        assert _signals(task.pid) == before


def test_a_daemon_that_dies_between_arming_and_criu_leaves_everything_as_it_was(
    tmp_path: Path, criu: Program
) -> None:
    with counting(tmp_path / "log") as tree, Inside(tree.init) as inside:
        (task,) = inside.tasks()
        before = _signals(task.pid)
        captured = threads.stop_and_capture(inside, threads.note(inside))
        captured = threads.ask_traps(captured)
        threads.arm(captured)
        assert _signals(task.pid) != before
        time.sleep(0.01)
        run.undo_dump(inside, threads.decode(threads.encode(captured)))
        tree.wait_for_more()
        assert _signals(task.pid) == before
