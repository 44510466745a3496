"""A program that computes with CuPy or JAX without pause and checks every step; see ``test_frameworks_gpu.py``.

    array_busy.py cupy|jax GIGABYTES      prints "steps N"; "WRONG ..." and exit status 3

Integers, so that what the GPU has must be exactly what NumPy computes beside it; and arrays that only lie there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy

WORDS = 8 << 20
SMALL = 1 << 12
#: Below it three times a value and a little more fits into 32 bits.
MODULUS = 1_000_003


def of_cupy() -> tuple[Callable[[Any], Any], Callable[[Any, int], Any], Callable[[Any], Any]]:
    import cupy  # type: ignore[import-not-found,unused-ignore]

    kernel = cupy.ElementwiseKernel(
        "int32 x, int32 n", "int32 y", f"y = (3 * x + n) % {MODULUS}", "step"
    )
    return cupy.asarray, kernel, cupy.asnumpy


def of_jax() -> tuple[Callable[[Any], Any], Callable[[Any, int], Any], Callable[[Any], Any]]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax  # type: ignore[import-not-found,unused-ignore]

    if jax.default_backend() != "gpu":
        print("no GPU for JAX:", jax.default_backend(), flush=True)
        sys.exit(4)
    step = jax.jit(lambda x, n: (3 * x + n) % MODULUS)
    return jax.device_put, step, numpy.asarray


def main() -> None:
    put, step, get = {"cupy": of_cupy, "jax": of_jax}[sys.argv[1]]()
    count = max(1, int(float(sys.argv[2]) * 1e9 / (WORDS * 4)))
    held = [put(numpy.arange(i, i + WORDS, dtype=numpy.int32)) for i in range(count)]
    here = numpy.arange(SMALL, dtype=numpy.int32)
    there, steps, told = put(here), 0, 0.0
    while True:
        for _ in range(50):
            number = steps % 1000
            there, here = step(there, number), (3 * here + number) % MODULUS
            steps += 1
        if not numpy.array_equal(get(there), here):
            print("WRONG step", steps, flush=True)
            os._exit(3)
        which = steps % count
        if not numpy.array_equal(
            get(held[which][::4097]), numpy.arange(which, which + WORDS, dtype=numpy.int32)[::4097]
        ):
            print("WRONG held", which, flush=True)
            os._exit(3)
        if time.monotonic() > told + 0.1:
            told = time.monotonic()
            print("steps", steps, flush=True)


main()
