"""One freeze or thaw in a process of its own, by the driver's calls alone: what starting a program for each costs.

    python -I -S one_call.py freeze|thaw PID

Goes to libcuda directly, so that it starts as fast as Python can. Prints nothing; the exit code says it all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys


class LockArgs(ctypes.Structure):
    """CUcheckpointLockArgs: timeout in ms, then reserved."""

    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


def main() -> None:
    action, pid = sys.argv[1], int(sys.argv[2])
    cuda = ctypes.CDLL("libcuda.so.1")
    check("cuInit", cuda.cuInit(0))
    if action == "freeze":
        args = LockArgs(timeout_ms=10_000)
        check("lock", cuda.cuCheckpointProcessLock(pid, ctypes.byref(args)))
        check("checkpoint", cuda.cuCheckpointProcessCheckpoint(pid, None))
        os.kill(pid, signal.SIGSTOP)
    else:
        os.kill(pid, signal.SIGCONT)
        check("restore", cuda.cuCheckpointProcessRestore(pid, None))
        check("unlock", cuda.cuCheckpointProcessUnlock(pid, None))


def check(call: str, result: int) -> None:
    if result:
        sys.exit(f"{call}: CUresult {result}")


if __name__ == "__main__":
    main()
