"""Uses the stand-in driver without pause and sees for itself whether everything is right; see ``test_direct.py``.

program.py PIECES [THREADS]      prints "ready", then "step N"; "WRONG ..." and exit status 3 where it is not
"""

import ctypes
import os
import sys
import threading

BYTES = 4 << 20
WORDS = 512
cuda = ctypes.CDLL("libcuda.so.1")


def check(result: int) -> None:
    if result:
        print(f"WRONG result {result}", flush=True)
        os._exit(3)


def main(pieces: int) -> None:
    check(cuda.cuInit(0))
    context = ctypes.c_void_p()
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))

    def allocate() -> ctypes.c_ulonglong:
        made = ctypes.c_ulonglong()
        check(cuda.cuMemAlloc_v2(ctypes.byref(made), ctypes.c_size_t(BYTES)))
        check(cuda.cuMemsetD8_v2(made, 0, ctypes.c_size_t(BYTES)))
        return made

    pause_us = int(os.environ.get("PROGRAM_SLEEP_US", "0"))

    def work(report: bool) -> None:
        check(cuda.cuCtxSetCurrent(context))
        memory = [allocate() for _ in range(pieces)]
        found = (ctypes.c_uint64 * WORDS)()
        count = ctypes.c_size_t(WORDS)
        step = 0
        while True:
            step += 1
            for address in memory:
                at = ctypes.c_void_p(address.value)
                parameters = (ctypes.c_void_p * 2)(ctypes.addressof(at), ctypes.addressof(count))
                check(cuda.cuLaunchKernel(None, 1, 1, 1, 1, 1, 1, 0, None, parameters, None))
            if pause_us:
                check(cuda.cuStandinSleep(pause_us))
            if step % 20 == 0 or pause_us:
                scratch = allocate()
                for address in memory:
                    check(cuda.cuMemcpyDtoHAsync_v2(found, address, ctypes.sizeof(found), None))
                    if set(found) != {step}:
                        print(f"WRONG {set(found)} at step {step}", flush=True)
                        os._exit(3)
                check(cuda.cuMemFree_v2(scratch))
                if report:
                    print(f"step {step}", flush=True)

    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for _ in range(threads - 1):
        threading.Thread(target=work, args=(False,), daemon=True).start()
    work(True)


main(int(sys.argv[1]))
