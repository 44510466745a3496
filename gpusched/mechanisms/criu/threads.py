"""The state of threads before CRIU touches them, and putting it back when CRIU was killed in the middle.

CRIU works through code that it puts into a process: for moments a thread has other registers, another signal mask and
a few bytes of its program overwritten. If CRIU is killed then, the kernel lets the thread go as it is: with the trap
(SIGTRAP) at the end of that code, if CRIU has not seen it yet, which ends the whole process. Two things prevent that:

1. Every process is stopped by SIGSTOP before. What was traced while it was stopped stops when its tracer dies.
2. SIGTRAP gets a handler meanwhile (``arm``). The kernel then prepares a call of it, which changes the stack and the
   registers, stops the thread before its first instruction, and everything can be put back.

So the image has that handler too: whoever brings it back calls ``disarm``.

Covers: stopping, capturing, arming, putting back. Blocking, for a millisecond a thread; root only. All calls of one
function must come from one thread, since the kernel binds tracees to it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import tracing
from gpusched.mechanisms.criu.inside import Inside, Task, send

#: recvfrom and recvmsg, as CRIU's code waits for orders; and the name of the memory that it is in.
_RECEIVE: Final = frozenset({"45", "47"} if tracing.IS_X86 else {"207", "212"})
_PARASITE: Final = b"/memfd:CRIUMFD"
#: CRIU writes at most so much there.
_CODE_BYTES: Final = 64
#: Every signal but KILL and STOP, as CRIU blocks them; TRAP may be missing.
_ALL_BLOCKED: Final = 0xFFFF_FFFF_FFFF_FFFF & ~(1 << 8) & ~(1 << 18)
_TRAP_BIT: Final = 1 << (signal.SIGTRAP - 1)
_SA_RESTORER: Final = 0x04000000
_IGNORED: Final = struct.pack("<QQQQ", signal.SIG_IGN, 0, 0, 0)
_STOP_S: Final = 5.0
_SETTLE_S: Final = 2.0


class ThreadState(msgspec.Struct, frozen=True, kw_only=True):
    """``below`` is what lies below its stack pointer, as far as the call of a handler reaches."""

    tid: int
    registers: bytes
    extended: bytes
    signal_mask: bytes
    below: bytes = b""


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """``code`` is what is at ``site``, the beginning of its first program part, where CRIU puts its own for moments.

    ``trap`` and ``pipe`` are what SIGTRAP and SIGPIPE do, as the kernel has it; empty where they stay as they are.
    """

    pid: int
    inner_pid: int = 0
    start_ticks: int
    was_stopped: bool
    threads: tuple[ThreadState, ...] = ()
    site: int = 0
    code: bytes = b""
    trap: bytes = b""
    pipe: bytes = b""


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    processes: tuple[ProcessState, ...] = ()


def encode(captured: Captured) -> bytes:
    return msgspec.msgpack.encode(captured)


def decode(content: bytes) -> Captured:
    """Empty for what is not understood: CRIU was not started then."""
    try:
        return msgspec.msgpack.decode(content, type=Captured)
    except msgspec.DecodeError:
        return Captured()


# -- before ---------------------------------------------------------------------------------------


def note(inside: Inside) -> Captured:
    """Who is stopped and who is not, before anybody is."""
    return Captured(
        processes=tuple(
            ProcessState(pid=task.pid, start_ticks=task.start_ticks, was_stopped=task.is_stopped)
            for task in inside.tasks()
        )
    )


def stop_and_capture(inside: Inside, noted: Captured) -> Captured:
    """Stops all processes of the tree and captures their state.

    Raises DeadlineExceeded when one does not stop, CriuError when one cannot be read; ``go_on`` undoes the stopping.
    """
    was_stopped = {(one.pid, one.start_ticks): one.was_stopped for one in noted.processes}
    return Captured(
        processes=tuple(
            _capture(task, was_stopped.get((task.pid, task.start_ticks), False))
            for task in _stop_all(inside)
        )
    )


def _stop_all(inside: Inside) -> list[Task]:
    """Until nobody new appears: a process that is stopped has no more children."""
    deadline = time.monotonic() + _STOP_S
    while True:
        tasks = inside.tasks()
        running = [task for task in tasks if not task.is_stopped]
        if not running:
            return tasks
        pids = ", ".join(str(task.pid) for task in running)
        if any(task.state == "t" for task in running):
            raise errors.CriuError(f"process {pids} is traced by another program; end that first")
        if time.monotonic() > deadline:
            # One that waits for a child in vfork cannot be stopped, and its child was.
            raise errors.DeadlineExceeded(
                f"processes {pids} do not stop within {_STOP_S:g} s; try again"
            )
        for task in running:
            send(task.pid, task.start_ticks, signal.SIGSTOP)
        time.sleep(0.001)


def _capture(task: Task, was_stopped: bool) -> ProcessState:
    try:
        with tracing.seized(task.pid) as held:
            threads = tuple(_thread_state(tid) for tid in held.tids)
            site = _site(task.pid)
            code = tracing.read_memory(task.pid, site, _CODE_BYTES)
    except OSError as error:
        raise errors.CriuError(
            f"process {task.pid} cannot be examined before it is saved: {error}"
        ) from error
    return ProcessState(
        pid=task.pid,
        inner_pid=task.inner_pid,
        start_ticks=task.start_ticks,
        was_stopped=was_stopped,
        threads=threads,
        site=site,
        code=code,
    )


def _thread_state(tid: int) -> ThreadState:
    registers = tracing.registers(tid)
    return ThreadState(
        tid=tid,
        registers=registers,
        extended=tracing.extended(tid),
        signal_mask=tracing.signal_mask(tid),
        below=_below(tid, tracing.stack_pointer(registers)),
    )


def _below(tid: int, pointer: int) -> bytes:
    """What the kernel may write when it prepares the call of a handler; empty where nothing is there yet."""
    size = os.sysconf("SC_MINSIGSTKSZ") + tracing.RED_ZONE_BYTES + mmap.PAGESIZE
    begin = max(0, pointer - size)
    while begin < pointer:
        with contextlib.suppress(OSError, OverflowError):
            found = tracing.read_memory(tid, begin, pointer - begin)
            if len(found) == pointer - begin:
                return found
        begin = (begin // mmap.PAGESIZE + 1) * mmap.PAGESIZE
    return b""


# -- the trap -------------------------------------------------------------------------------------


def ask_traps(captured: Captured) -> Captured:
    """The same, with what SIGTRAP does. ``captured`` must be on record: here threads make calls for us already."""
    return Captured(
        processes=tuple(
            msgspec.structs.replace(
                one, trap=_action_of(one, signal.SIGTRAP), pipe=_action_of(one, signal.SIGPIPE)
            )
            for one in captured.processes
        )
    )


def _action_of(process: ProcessState, number: int) -> bytes:
    """Empty where it cannot be asked: such a process takes its chance."""
    if process.site and _is_there(process):
        with contextlib.suppress(OSError), tracing.seized(process.pid, only_main=True) as held:
            if held.may_call:
                return tracing.action(held.tids[0], number)
    return b""


def arm(captured: Captured) -> None:
    """Gives SIGTRAP a handler in every process. It never runs: its address is that of CRIU's own code."""
    for process in captured.processes:
        if process.trap and _is_there(process):
            site = process.site
            handler = struct.pack("<QQQQ", site, _SA_RESTORER, site, 2**64 - 1)
            with contextlib.suppress(OSError), tracing.seized(process.pid, only_main=True) as held:
                tracing.action(held.tids[0], signal.SIGTRAP, handler)


def disarm(captured: Captured) -> None:
    """What SIGTRAP did before ``arm`` it does again; for processes whose dump succeeded. No CRIU may be left."""
    for process in captured.processes:
        if process.trap and _is_there(process):
            with contextlib.suppress(OSError), tracing.seized(process.pid, only_main=True) as held:
                tracing.action(held.tids[0], signal.SIGTRAP, process.trap)


def disarm_restored(captured: Captured, tasks: Iterable[Task]) -> None:
    """The same for processes that came back from the image of ``captured``, stopped. Raises CriuError."""
    traps = {one.inner_pid: one.trap for one in captured.processes if one.trap}
    for task in tasks:
        if trap := traps.get(task.inner_pid):
            try:
                with tracing.seized(task.pid, only_main=True) as held:
                    tracing.action(held.tids[0], signal.SIGTRAP, trap)
            except OSError as error:
                raise errors.CriuError(
                    f"process {task.pid} cannot be examined after it came back: {error}"
                ) from error


def _is_there(process: ProcessState) -> bool:
    """And stopped."""
    found = proc.read_stat(process.pid)
    return found is not None and found.start_ticks == process.start_ticks and found.state == "T"


# -- after ----------------------------------------------------------------------------------------


def put_back(captured: Captured) -> None:
    """Takes out of every process what CRIU has left in it, which leaves it stopped. No CRIU may be left.

    Only threads in CRIU's code get their registers back, also where that code would put everything back by itself: it
    answers CRIU first, which would end the process (SIGPIPE). Whoever had gone on a little way stays there. A process
    that has ended, or that somebody let go on meanwhile, is passed over.
    """
    _settle(captured)
    for process in captured.processes:
        if _is_there(process):
            with contextlib.suppress(OSError), tracing.seized(process.pid) as held:
                tracing.write_memory(process.pid, process.site, process.code)
                for thread in process.threads:
                    if thread.tid in held.tids:
                        tracing.clear_breakpoints(thread.tid)  # one of CRIU's outlives it
                        _put_thread_back(process, thread)
                _drop_pending(held, process)


def _drop_pending(held: tracing.Held, process: ProcessState) -> None:
    """What CRIU's code has brought upon the process: its trap, and the pipe to CRIU that has nobody at its other end.

    The kernel drops what is pending of a signal that is ignored.
    """
    for number, before in ((signal.SIGTRAP, process.trap), (signal.SIGPIPE, process.pipe)):
        if before:
            tracing.action(held.tids[0], number, _IGNORED)
            tracing.action(held.tids[0], number, before)


def _settle(captured: Captured) -> None:
    """Waits until every thread has stopped: on a busy machine that takes a moment after its tracer has died.

    Not longer than 2 s in all: somebody may have let a process go on.
    """
    deadline = time.monotonic() + _SETTLE_S
    for process in captured.processes:
        while process.threads and time.monotonic() < deadline:
            found = proc.read_stat(process.pid)
            if found is None or found.start_ticks != process.start_ticks:
                break
            if all(where.state in "TZX" for where in _threads_of(process.pid)):
                break
            time.sleep(0.0005)


def go_on(inside: Inside, captured: Captured) -> None:
    """Stops those that were stopped before and lets all others go on, also those that were not there yet."""
    stopped = {(one.pid, one.start_ticks) for one in captured.processes if one.was_stopped}
    for task in inside.tasks():
        if (task.pid, task.start_ticks) not in stopped:
            send(task.pid, task.start_ticks, signal.SIGCONT)
        elif not task.is_stopped:
            send(task.pid, task.start_ticks, signal.SIGSTOP)


def _put_thread_back(process: ProcessState, thread: ThreadState) -> None:
    address = tracing.instruction(tracing.registers(thread.tid))
    is_in_call = tracing.is_in_call(process.pid, address)  # of ours
    mask = int.from_bytes(tracing.signal_mask(thread.tid), "little")
    is_in_code = (
        is_in_call or _is_at(process.site, address) or _is_in_parasite(process.pid, address)
    )
    if is_in_code:
        tracing.set_extended(thread.tid, thread.extended)
        tracing.set_registers(thread.tid, thread.registers)
        below = tracing.stack_pointer(thread.registers) - len(thread.below)
        tracing.write_memory(process.pid, below, thread.below)
    if is_in_code or mask | _TRAP_BIT == _ALL_BLOCKED:
        tracing.set_signal_mask(thread.tid, thread.signal_mask)


# -- when CRIU may be killed ----------------------------------------------------------------------


def may_be_left(tasks: Iterable[Task]) -> bool:
    """Whether these processes survive it when CRIU, which must be halted, is killed now, even if they are not armed.

    Not where one executes what CRIU put into it, or has just run into the trap at its end: the kernel delivers that
    trap when the tracer dies, and nobody can take it back.
    """
    for task in tasks:
        site = _site(task.pid)
        for where in _threads_of(task.pid):
            if where.state in "TS" or where.is_receiving:
                continue
            if where.state != "t" or _is_at(site, where.address):
                return False
            if _is_in_parasite(task.pid, where.address):
                return False
    return True


class _Where(NamedTuple):
    """What a thread is doing. ``address`` is that of its next instruction; 0 where it is running."""

    tid: int
    state: str
    is_receiving: bool
    address: int


def _threads_of(pid: int) -> Iterator[_Where]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with contextlib.suppress(OSError, ValueError, IndexError):
                text = Path(f"/proc/{pid}/task/{name}/stat").read_text()
                state = text.rpartition(")")[2].split()[0]
                words = Path(f"/proc/{pid}/task/{name}/syscall").read_text().split()
                address = int(words[-1], 16) if words[0] != "running" else 0
                yield _Where(int(name), state, words[0] in _RECEIVE, address)


def _is_in_parasite(pid: int, address: int) -> bool:
    for line in tracing.maps(pid):
        if _PARASITE in line:
            begin, end = tracing.address_range(line)
            if begin <= address < end:
                return True
    return False


def _site(pid: int) -> int:
    """Where CRIU puts its first code: the beginning of the first executable mapping."""
    for line in tracing.maps(pid):
        if line.split(None, 2)[1][2:3] == b"x":
            return tracing.address_range(line)[0]
    return 0


def _is_at(site: int, address: int) -> bool:
    return site <= address < site + _CODE_BYTES
