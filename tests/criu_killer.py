"""Runs a program, and kills it after one certain call of its ptrace(2): ``python -I -S criu_killer.py FILE PROGRAM...``

FILE says which (0: none). What it lets go on (PTRACE_CONT, which CRIU does before its code runs in another process)
has then run into the end of that code, and nobody has seen it. FILE.seen counts those calls. x86-64 only.
"""

# ruff: noqa: PTH123
from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

TRACEME, PEEKUSER, CONT, SYSCALL, SETOPTIONS = 0, 3, 7, 24, 0x4200
SYSGOOD_AND_EXITKILL = 1 | 1 << 20
SETSIGMASK = 0x420B
RDI, ORIG_RAX = 14 * 8, 15 * 8
PTRACE_NUMBER = 101
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
libc.ptrace.restype = ctypes.c_long


def main() -> int:
    file, argv = sys.argv[1], sys.argv[2:]
    with open(file) as chosen:
        at = int(chosen.read())
    pid = os.fork()
    if pid == 0:
        libc.ptrace(TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.execv(argv[0], argv)
    os.waitpid(pid, 0)
    libc.ptrace(SETOPTIONS, pid, 0, SYSGOOD_AND_EXITKILL)
    seen, is_leaving, number = 0, False, 0
    while True:
        libc.ptrace(SYSCALL, pid, 0, number)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSTOPPED(status):
            break
        number = os.WSTOPSIG(status)
        if number == signal.SIGTRAP | 0x80:
            number, is_leaving = 0, not is_leaving
            if is_leaving or libc.ptrace(PEEKUSER, pid, ORIG_RAX, 0) != PTRACE_NUMBER:
                continue
            if libc.ptrace(PEEKUSER, pid, RDI, 0) in (CONT, SETSIGMASK):
                seen += 1
                if seen == at:
                    time.sleep(0.0003)
                    os.kill(pid, signal.SIGKILL)
        elif number == signal.SIGTRAP:
            number = 0
    with open(f"{file}.seen", "w") as told:
        told.write(str(seen))
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


sys.exit(main())
