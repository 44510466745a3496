"""The state of threads before CRIU touches them, and putting it back when CRIU was killed in the middle.

CRIU works through code that it puts into a process: for moments a thread has other registers, another signal mask and
a few bytes of its program overwritten. If CRIU is killed then, the kernel lets the thread go as it is, and it
dies of the trap behind that code (seen in 3 of 168 kills). So every process is stopped by SIGSTOP before: what was
traced while it was stopped stays stopped when its tracer dies, and its state can be put back.

Covers: stopping, capturing, putting back. Blocking, for a millisecond a thread; root only. All calls of one function
must come from one thread, since the kernel binds tracees to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu.inside import Inside, Task, send

_SEIZE, _DETACH = 0x4206, 17
_GETREGSET, _SETREGSET, _GETSIGMASK, _SETSIGMASK = 0x4204, 0x4205, 0x420A, 0x420B
_POKEUSER: Final = 6
_PRSTATUS, _FPREGS, _X86_XSTATE = 1, 2, 0x202
_IS_X86: Final = platform.machine() == "x86_64"
#: struct user of x86-64: where its debug registers begin.
_DEBUG_REGISTERS: Final = 848
#: recvfrom and recvmsg, as CRIU's code waits for orders; and the name of the memory that it is in.
_RECEIVE: Final = frozenset({"45", "47"} if _IS_X86 else {"207", "212"})
_PARASITE: Final = b"/memfd:CRIUMFD"
_WALL: Final = 0x40000000
_MAX_REGSET: Final = 16384
#: CRIU writes at most so much there.
_CODE_BYTES: Final = 64
#: Every signal but KILL and STOP, as CRIU blocks them.
_ALL_BLOCKED: Final = (0xFFFF_FFFF_FFFF_FFFF & ~(1 << 8) & ~(1 << 18)).to_bytes(8, "little")
_WAIT_S: Final = 5.0
_STOP_S: Final = 5.0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class ThreadState(msgspec.Struct, frozen=True, kw_only=True):
    tid: int
    registers: bytes
    extended: bytes
    signal_mask: bytes


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """``code`` is what is at ``site``, the beginning of its first program part, where CRIU puts its own for moments."""

    pid: int
    start_ticks: int
    was_stopped: bool
    threads: tuple[ThreadState, ...] = ()
    site: int = 0
    code: bytes = b""


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
        with _seized(task.pid) as tids:
            threads = tuple(
                ThreadState(
                    tid=tid,
                    registers=_get_set(tid, _PRSTATUS),
                    extended=_get_set(tid, _X86_XSTATE if _IS_X86 else _FPREGS),
                    signal_mask=_signal_mask(tid),
                )
                for tid in tids
            )
            site = _site(task.pid)
            code = _read_memory(task.pid, site)
    except OSError as error:
        raise errors.CriuError(
            f"process {task.pid} cannot be examined before it is saved: {error}"
        ) from error
    return ProcessState(
        pid=task.pid,
        start_ticks=task.start_ticks,
        was_stopped=was_stopped,
        threads=threads,
        site=site,
        code=code,
    )


# -- after ----------------------------------------------------------------------------------------


def put_back(captured: Captured) -> None:
    """Takes out of every process what CRIU has left in it, which leaves it stopped. No CRIU may be left.

    Only threads in CRIU's code get their registers back: a main thread that cures itself when CRIU ends may have gone
    on a little way before the kernel stopped it, and would be set back in time. A process that has ended, or that
    somebody let go on meanwhile, is passed over.
    """
    for process in captured.processes:
        found = proc.read_stat(process.pid)
        if found is not None and found.start_ticks == process.start_ticks and found.state == "T":
            cures = _cures_itself(
                process.pid
            )  # asked before it is seized, which changes the answer
            with contextlib.suppress(OSError), _seized(process.pid) as tids:
                _write_code(process)
                for thread in process.threads:
                    if thread.tid in tids and not (cures and thread.tid == process.pid):
                        _put_thread_back(process, thread)


def go_on(inside: Inside, captured: Captured) -> None:
    """Stops those that were stopped before and lets all others go on, also those that were not there yet."""
    stopped = {(one.pid, one.start_ticks) for one in captured.processes if one.was_stopped}
    for task in inside.tasks():
        if (task.pid, task.start_ticks) not in stopped:
            send(task.pid, task.start_ticks, signal.SIGCONT)
        elif not task.is_stopped:
            send(task.pid, task.start_ticks, signal.SIGSTOP)


def _put_thread_back(process: ProcessState, thread: ThreadState) -> None:
    address = _instruction(_get_set(thread.tid, _PRSTATUS))
    if _is_at(process.site, address) or _is_in_parasite(process.pid, address):
        _set(thread.tid, _X86_XSTATE if _IS_X86 else _FPREGS, thread.extended)
        _set(thread.tid, _PRSTATUS, thread.registers)
    if _signal_mask(thread.tid) == _ALL_BLOCKED:
        mask = ctypes.create_string_buffer(thread.signal_mask, 8)
        _ptrace(_SETSIGMASK, thread.tid, 8, ctypes.addressof(mask))
    if _IS_X86:  # a breakpoint of CRIU's outlives it; control first
        for number in (7, 0, 1, 2, 3):
            _ptrace(_POKEUSER, thread.tid, _DEBUG_REGISTERS + 8 * number, 0)


# -- when CRIU may be killed ----------------------------------------------------------------------


def may_be_left(tasks: Iterable[Task]) -> bool:
    """Whether these processes survive it when CRIU, which must be halted, is killed now.

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


def _cures_itself(pid: int) -> bool:
    """Whether CRIU's code in the main thread waits for orders. When nobody gives any it puts everything back."""
    return any(
        where.is_receiving and where.tid == pid and _is_in_parasite(pid, where.address)
        for where in _threads_of(pid)
    )


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
    for line in _maps(pid):
        if _PARASITE in line:
            begin, end = (int(part, 16) for part in line.split(None, 1)[0].split(b"-"))
            if begin <= address < end:
                return True
    return False


def _maps(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/maps").read_bytes().splitlines()
    except OSError:
        return []


# -- the kernel's calls ---------------------------------------------------------------------------


@contextlib.contextmanager
def _seized(pid: int) -> Iterator[list[int]]:
    """All threads of a stopped process, traced and at rest; afterwards it is stopped as before. Raises OSError."""
    tids: list[int] = []
    try:
        for name in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            _ptrace(_SEIZE, int(name), 0, 0)
            tids.append(int(name))
            _wait(int(name))
        yield tids
    finally:
        for tid in tids:
            with contextlib.suppress(OSError):
                _ptrace(_DETACH, tid, 0, 0)


def _wait(tid: int) -> None:
    deadline = time.monotonic() + _WAIT_S
    while os.waitpid(tid, os.WNOHANG | _WALL)[0] == 0:
        if time.monotonic() > deadline:
            raise TimeoutError(f"thread {tid} does not come to rest")
        time.sleep(0.0002)


def _ptrace(request: int, tid: int, address: int, value: int) -> None:
    if _libc.ptrace(request, tid, address, value) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x} of {tid}: {os.strerror(number)}")


def _get_set(tid: int, kind: int) -> bytes:
    buffer = ctypes.create_string_buffer(_MAX_REGSET)
    vector = _IoVec(ctypes.addressof(buffer), _MAX_REGSET)
    _ptrace(_GETREGSET, tid, kind, ctypes.addressof(vector))
    return buffer.raw[: vector.length]


def _set(tid: int, kind: int, content: bytes) -> None:
    buffer = ctypes.create_string_buffer(content, len(content))
    vector = _IoVec(ctypes.addressof(buffer), len(content))
    _ptrace(_SETREGSET, tid, kind, ctypes.addressof(vector))


def _signal_mask(tid: int) -> bytes:
    mask = ctypes.create_string_buffer(8)
    _ptrace(_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.raw


# -- code -----------------------------------------------------------------------------------------


def _site(pid: int) -> int:
    """Where CRIU puts its first code: the beginning of the first executable mapping."""
    for line in _maps(pid):
        if line.split(None, 2)[1][2:3] == b"x":
            return int(line.split(b"-", 1)[0], 16)
    return 0


def _is_at(site: int, address: int) -> bool:
    return site <= address < site + _CODE_BYTES


def _instruction(registers: bytes) -> int:
    """The program counter in NT_PRSTATUS."""
    offset = 16 * 8 if _IS_X86 else 32 * 8
    return int.from_bytes(registers[offset : offset + 8], "little")


def _read_memory(pid: int, address: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(_CODE_BYTES)


def _write_code(process: ProcessState) -> None:
    """Only where it differs: a page that is written to is no longer shared with the file."""
    if process.code and _read_memory(process.pid, process.site) != process.code:
        with Path(f"/proc/{process.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(process.site)
            memory.write(process.code)
