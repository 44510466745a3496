"""Holding the threads of a stopped process by ptrace: reading and changing them, and having one make a system call.

Blocking, for a millisecond a thread; root only. All calls of one function must come from one thread, since the kernel
binds tracees to it. Does not cover: which threads, and why (``threads.py``). Everything here raises OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpusched.mechanisms import proc

IS_X86: Final = platform.machine() == "x86_64"
_SEIZE, _DETACH, _SYSCALL = 0x4206, 17, 24
_GETREGSET, _SETREGSET, _GETSIGMASK, _SETSIGMASK = 0x4204, 0x4205, 0x420A, 0x420B
_POKEUSER: Final = 6
_TRACE_SYSGOOD, _SUSPEND_SECCOMP = 0x1, 0x200000
_PRSTATUS, _EXTENDED = 1, 0x202 if IS_X86 else 2
#: struct user of x86-64: where its debug registers begin.
_DEBUG_REGISTERS: Final = 848
_WALL: Final = 0x40000000
_MAX_REGSET: Final = 16384
_WAIT_S: Final = 5.0
_STOPPED_S: Final = 1.0
_STOPS: Final = 16
_EVERY_SIGNAL: Final = b"\xff" * 8
#: Words of NT_PRSTATUS on x86-64.
_RAX, _ORIG_RAX, _RIP, _RSP, _WORDS = 10, 15, 16, 19, 27
_ARGUMENTS: Final = (14, 13, 12, 7)  # rdi, rsi, rdx, r10
#: What lies below a stack pointer and may be in use, on x86-64.
RED_ZONE_BYTES: Final = 128
_SYSCALL_CODE: Final = b"\x0f\x05"
_RT_SIGACTION: Final = 13
ACTION_BYTES: Final = 32  # handler, flags, restorer, mask
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """``tids`` of a process at rest. ``may_call``: its seccomp filters, if any, are out of the way of our calls."""

    tids: list[int]
    may_call: bool


@contextlib.contextmanager
def seized(pid: int, *, only_main: bool = False) -> Iterator[Held]:
    """All threads of a stopped process, or its main one, traced and at rest; afterwards it is stopped as before."""
    options, may_call = _TRACE_SYSGOOD, True
    if _is_filtered(pid):
        options |= _SUSPEND_SECCOMP
    tids: list[int] = []
    try:
        for name in [pid] if only_main else os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            tid = int(name)
            try:
                _ptrace(_SEIZE, tid, 0, options)
            except OSError:
                if not options & _SUSPEND_SECCOMP:
                    raise
                options, may_call = _TRACE_SYSGOOD, False
                _ptrace(_SEIZE, tid, 0, options)
            tids.append(tid)
            _wait(tid)
        yield Held(tids=tids, may_call=may_call and IS_X86)
    finally:
        for tid in tids:
            with contextlib.suppress(OSError):
                _ptrace(_DETACH, tid, 0, 0)
        _wait_stopped(tids)


def _wait_stopped(tids: list[int]) -> None:
    """Until those that were let go stand still again by themselves, which takes a moment on a busy machine."""
    deadline = time.monotonic() + _STOPPED_S
    for tid in tids:
        while time.monotonic() < deadline:
            found = proc.read_stat(tid)
            if found is None or found.state == "T" or not found.is_alive:
                break
            time.sleep(0.0002)


def _is_filtered(pid: int) -> bool:
    return "\nSeccomp:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def _wait(tid: int) -> int:
    """The status with which a thread has come to rest."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        pid, status = os.waitpid(tid, os.WNOHANG | _WALL)
        if pid:
            return status
        if time.monotonic() > deadline:
            raise TimeoutError(f"thread {tid} does not come to rest")
        time.sleep(0.0002)


def _ptrace(request: int, tid: int, address: int, value: int) -> None:
    if _libc.ptrace(request, tid, address, value) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x} of {tid}: {os.strerror(number)}")


# -- what a thread is -----------------------------------------------------------------------------


def registers(tid: int) -> bytes:
    return _get_set(tid, _PRSTATUS)


def set_registers(tid: int, content: bytes) -> None:
    _set(tid, _PRSTATUS, content)


def extended(tid: int) -> bytes:
    """Floating point, vectors and the like."""
    return _get_set(tid, _EXTENDED)


def set_extended(tid: int, content: bytes) -> None:
    _set(tid, _EXTENDED, content)


def signal_mask(tid: int) -> bytes:
    mask = ctypes.create_string_buffer(8)
    _ptrace(_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.raw


def set_signal_mask(tid: int, content: bytes) -> None:
    mask = ctypes.create_string_buffer(content, 8)
    _ptrace(_SETSIGMASK, tid, 8, ctypes.addressof(mask))


def clear_breakpoints(tid: int) -> None:
    if IS_X86:
        for number in (7, 0, 1, 2, 3):  # control first
            _ptrace(_POKEUSER, tid, _DEBUG_REGISTERS + 8 * number, 0)


def instruction(content: bytes) -> int:
    """The program counter in what ``registers`` gave."""
    offset = 8 * _RIP if IS_X86 else 32 * 8
    return int.from_bytes(content[offset : offset + 8], "little")


def stack_pointer(content: bytes) -> int:
    offset = 8 * _RSP if IS_X86 else 31 * 8
    return int.from_bytes(content[offset : offset + 8], "little")


def _get_set(tid: int, kind: int) -> bytes:
    buffer = ctypes.create_string_buffer(_MAX_REGSET)
    vector = _IoVec(ctypes.addressof(buffer), _MAX_REGSET)
    _ptrace(_GETREGSET, tid, kind, ctypes.addressof(vector))
    return buffer.raw[: vector.length]


def _set(tid: int, kind: int, content: bytes) -> None:
    buffer = ctypes.create_string_buffer(content, len(content))
    vector = _IoVec(ctypes.addressof(buffer), len(content))
    _ptrace(_SETREGSET, tid, kind, ctypes.addressof(vector))


# -- its memory -----------------------------------------------------------------------------------


def maps(pid: int) -> list[bytes]:
    """Empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/maps").read_bytes().splitlines()
    except OSError:
        return []


def address_range(line: bytes) -> tuple[int, int]:
    begin, end = (int(part, 16) for part in line.split(None, 1)[0].split(b"-"))
    return begin, end


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Less than ``size`` where the rest is not there."""
    if not 0 <= address < 2**63:  # a program may have anything in its registers
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def write_memory(pid: int, address: int, content: bytes) -> None:
    """Only where it differs: a page that is written to is no longer shared with its file."""
    if content and read_memory(pid, address, len(content)) != content:
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(content)


# -- calls ----------------------------------------------------------------------------------------


def action(tid: int, number: int, new: bytes = b"") -> bytes:
    """What a signal does in the process of a held thread, as the kernel has it; ``new`` takes its place.

    The thread makes the call itself, and is afterwards as it was. x86-64 only.
    """
    before = registers(tid)
    if len(before) != 8 * _WORDS:
        raise OSError(errno.ENOTSUP, "not a 64-bit thread")
    room = (stack_pointer(before) - RED_ZONE_BYTES - 2 * ACTION_BYTES) & ~0xF
    kept = read_memory(tid, room, 2 * ACTION_BYTES)
    if len(kept) != 2 * ACTION_BYTES:
        raise OSError(errno.EFAULT, "it has no stack")
    write_memory(tid, room, new + kept[len(new) :])
    try:
        _call(tid, before, (_RT_SIGACTION, number, room if new else 0, room + ACTION_BYTES, 8))
        return read_memory(tid, room + ACTION_BYTES, ACTION_BYTES)
    finally:
        write_memory(tid, room, kept)


def is_in_call(pid: int, address: int) -> bool:
    """Whether that is where a thread stands whose tracer died while it made a call for us."""
    with contextlib.suppress(OSError):
        return IS_X86 and address - _syscall_code(pid) in (0, len(_SYSCALL_CODE))
    return False


def _call(tid: int, before: bytes, call: tuple[int, ...]) -> None:
    """No instruction of ours and no trap: when we die in the middle, it stops, and can be put back."""
    words = list(struct.unpack(f"<{_WORDS}Q", before))
    words[_RIP], words[_RAX], words[_ORIG_RAX] = _syscall_code(tid), call[0], 2**64 - 1
    for where, value in zip(_ARGUMENTS, call[1:], strict=True):
        words[where] = value
    mask = signal_mask(tid)
    set_signal_mask(tid, _EVERY_SIGNAL)  # what is pending must wait
    try:
        set_registers(tid, struct.pack(f"<{_WORDS}Q", *words))
        _to_next_stop(tid)
        _to_next_stop(tid)
        (result,) = struct.unpack_from("<q", registers(tid), 8 * _RAX)
    finally:
        set_registers(tid, before)
        set_signal_mask(tid, mask)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _to_next_stop(tid: int) -> None:
    """Into a call, or out of it."""
    for _ in range(_STOPS):
        _ptrace(_SYSCALL, tid, 0, 0)
        status = _wait(tid)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, f"thread {tid} ended")
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            return
    raise OSError(errno.EINTR, f"thread {tid} makes no call")


def _syscall_code(tid: int) -> int:
    """The address of an instruction that enters the kernel: every process has one in what the kernel maps into it."""
    for line in maps(tid):
        if line.endswith(b"[vdso]"):
            begin, end = address_range(line)
            offset = read_memory(tid, begin, end - begin).find(_SYSCALL_CODE)
            if offset >= 0:
                return begin + offset
    raise OSError(errno.ENOENT, f"thread {tid} has no vDSO")
