"""The workload's command line: allocates VRAM, fills it from a seed, and recomputes its digest for ever.

    python -m gpusched.workload --vram 1G [--busy] [--gpu 0,1] [--seed N] [--ticks N]

Prints ``ready digest=HEX`` and then, about every 0.2 s, ``tick N digest=HEX``, each digest computed from what is in
VRAM at that moment. Simulated GPUs are used where GPUSCHED_SIM_DIR is set, and the ready line ends in ``simulated``.

Exit codes: 0 after ``--ticks``; 1 no usable GPU, or a call failed; 2 usage; 3 the digest changed (``corrupt ...``);
4 out of memory. SIGTERM ends it as it ends any program.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from gpusched.units import MIB, parse_size
from gpusched.workload.memory import Exit, Memory, WorkloadError

_TICK_S: Final = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    # Ending quietly when a pipe or a terminal goes away is what programs do; Python would print a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        memory = _allocate(options.vram, options.gpu)
        memory.fill(options.seed)
        return _tick(memory, busy=options.busy, ticks=options.ticks)
    except WorkloadError as error:
        print(f"gpusched.workload: {error.message}", file=sys.stderr)
        return error.code


def _tick(memory: Memory, *, busy: bool, ticks: int | None) -> int:
    expected = memory.digest()
    print(f"ready digest={expected:016x}{' simulated' if memory.simulated else ''}", flush=True)
    tick = 0
    due = time.monotonic() + _TICK_S
    while ticks is None or tick < ticks:
        if not busy:
            time.sleep(max(0.0, due - time.monotonic()))
        found = memory.digest()
        if found != expected:
            print(
                f"corrupt tick={tick + 1} digest={found:016x} expected={expected:016x}", flush=True
            )
            return Exit.CORRUPT
        if time.monotonic() >= due:
            tick += 1
            print(f"tick {tick} digest={found:016x}", flush=True)
            due = time.monotonic() + _TICK_S  # not due + _TICK_S: no burst of ticks after a thaw
    return 0


def _allocate(size_bytes: int, devices: Sequence[int]) -> Memory:
    if os.environ.get("GPUSCHED_SIM_DIR"):
        from gpusched.workload.simulated import SimulatedMemory

        return SimulatedMemory(size_bytes, devices)
    from gpusched.workload.cuda import CudaMemory

    return CudaMemory(size_bytes, devices)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpusched.workload",
        description="Fills VRAM and says at every tick whether the contents are still right.",
    )
    parser.add_argument(
        "--vram", type=_checked(parse_size), default=1024 * MIB, metavar="SIZE", help="such as 1G"
    )
    parser.add_argument("--busy", action="store_true", help="keep the GPU at work without a pause")
    parser.add_argument(
        "--gpu",
        type=_checked(_devices),
        default=[0],
        metavar="N[,N]",
        help="visible devices, sharing the VRAM",
    )
    parser.add_argument("--seed", type=_checked(_seed), default=1, metavar="N")
    parser.add_argument("--ticks", type=int, metavar="N", help="end after so many; default: never")
    options = parser.parse_args(argv)
    if options.vram < MIB * len(options.gpu):
        parser.error("--vram must be at least 1M for each GPU")
    return options


def _checked(read: Callable[[str], object]) -> Callable[[str], object]:
    """Lets argparse print what ``read`` says is wrong; it keeps the text of a ValueError to itself."""

    def checked(text: str) -> object:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def _devices(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 0 or len(set(found)) != len(found):
        raise ValueError(f"{text!r} is not a list of device numbers, such as 0,1")
    return found


def _seed(text: str) -> int:
    found = int(text)
    if not 0 <= found < 2**64:
        raise ValueError(f"{text} is not between 0 and 2**64 - 1")
    return found


if __name__ == "__main__":
    sys.exit(main())
