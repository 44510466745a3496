"""A JAX program that is never at rest and checks every step of its own; see ``test_direct_gpu.py``.

jax_busy.py GIGABYTES       prints "ready", then "steps N"; "WRONG ..." and exit status 3 where it is not right
"""

from __future__ import annotations

import os
import sys
from typing import Any

import jax  # type: ignore[import-not-found,unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found,unused-ignore]

WORDS = 16 << 20


def step(counter: Any, held: Any) -> tuple[Any, Any]:
    return counter + 1, held[::4097].sum()


advance: Any = jax.jit(step)


def main() -> None:
    count = max(1, int(float(sys.argv[1]) * 1e9 / (WORDS * 4)))
    held = [jnp.arange(i, i + WORDS, dtype=jnp.int32) for i in range(count)]
    counter = jnp.zeros(4096, dtype=jnp.int32)
    sums = [int(advance(counter, one)[1]) for one in held]
    print("ready", flush=True)
    number = 0
    while True:
        which = number % count
        for _ in range(99):
            counter, _ = advance(counter, held[which])
        counter, found = advance(counter, held[which])
        number += 1
        if int(found) != sums[which]:
            print("WRONG held", which, int(found), sums[which], flush=True)
            os._exit(3)
        if (int(counter.min()), int(counter.max())) != (number * 100, number * 100):
            print("WRONG counter", int(counter.min()), int(counter.max()), number, flush=True)
            os._exit(3)
        print("steps", number, flush=True)


main()
