"""What a call on a freezable model costs beside the same call on a plain Ray actor, and what large payloads do.

    python benchmarks/ray_calls.py [--calls 2000] [--mib 64] [--rounds 5] [--out DIR] [--rehearse]

No GPU: what a call costs does not depend on one. A private daemon on simulated GPUs, a local Ray cluster. Plain and
hosted are called by turns, so that what else the machine does falls on both; a warm copy of the same bytes is
measured beside them. Ray's object store is small, and both fill it some times over before: a result costs several times
as much where its worker has written nothing yet, whoever gives it. Leave the machine alone meanwhile.

Bars: a tiny call at most 0.3 ms over a plain actor's (p50); the payload by ObjectRef into the model at least 0.5 of
the warm copy's rate, as a result at least 0.3. The exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

import machine
from gpusched.demo import private_daemon
from ray_integration import freezable

MAX_OVER_PLAIN_MS = 0.3
MIN_IN, MIN_OUT = 0.5, 0.3
_WARM_UP = 100
#: Ray's object store has room for so many payloads, ...
_STORE_PAYLOADS = 6
#: ... and each actor gives so many before it counts.
_WARM_UP_PAYLOADS = 4 * _STORE_PAYLOADS


class Model:
    """Does nothing with what it gets, so that the call is all that costs."""

    def __init__(self) -> None:
        self.array: Any = None

    def tiny(self, number: int) -> int:
        return number

    def size(self, array: Any) -> int:
        return int(array.nbytes)

    def make(self, size: int) -> None:
        self.array = np.ones(size, dtype=np.uint8)

    def give(self) -> Any:
        return self.array


def timed_ms(act: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    act()
    return (time.perf_counter() - begun) * 1000


def tiny_ms(actor: Any, calls: int) -> list[float]:
    return [timed_ms(lambda: ray.get(actor.tiny.remote(1))) for _ in range(calls)]


def copies_ms(size: int, count: int) -> list[float]:
    """A copy between buffers that were written before: the least that moving the bytes once can cost."""
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
    return [timed_ms(lambda: np.copyto(target, source)) for _ in range(count)]


def measure(actors: dict[str, Any], calls: int, size: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"memcpy_ms": []}
    for name, actor in actors.items():
        found[name] = {"tiny_ms": [], "in_ms": [], "out_ms": []}
        tiny_ms(actor, _WARM_UP)
        ray.get(actor.make.remote(size))
        for _ in range(_WARM_UP_PAYLOADS):
            ray.get(actor.give.remote())
    array = ray.put(np.ones(size, dtype=np.uint8))
    for number in range(rounds + 1):
        for name, actor in actors.items():
            took = {
                "tiny_ms": tiny_ms(actor, calls // rounds),
                "in_ms": [timed_ms(lambda: ray.get(actor.size.remote(array))) for _ in range(4)],  # noqa: B023
                "out_ms": [timed_ms(lambda: ray.get(actor.give.remote())) for _ in range(4)],  # noqa: B023
            }
            if number:  # the first round warms up
                for key, values in took.items():
                    found[name][key] += values
        if number:
            found["memcpy_ms"] += copies_ms(size, 4)
    return found


def p50(values: list[float]) -> float:
    return statistics.median(values)


def judge(found: dict[str, Any]) -> dict[str, float]:
    """The figures that the bars are about."""
    hosted, plain, copy = found["hosted"], found["plain"], p50(found["memcpy_ms"])
    return {
        "tiny_over_plain_ms": round(p50(hosted["tiny_ms"]) - p50(plain["tiny_ms"]), 3),
        "in_share_of_memcpy": round(copy / p50(hosted["in_ms"]), 3),
        "out_share_of_memcpy": round(copy / p50(hosted["out_ms"]), 3),
        "plain_in_share_of_memcpy": round(copy / p50(plain["in_ms"]), 3),
        "plain_out_share_of_memcpy": round(copy / p50(plain["out_ms"]), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="every step, no figure to keep")
    options = parser.parse_args()
    if options.rehearse and options.out == machine.RESULTS:
        parser.error("a rehearsal is never among the results: name another directory with --out")
    with private_daemon("sim", "64M") as client:
        os.environ["GPUSCHED_SOCKET"] = client.socket_path
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=40,
            object_store_memory=max(128, _STORE_PAYLOADS * options.mib) << 20,
        )
        try:
            plain: Any = ray.remote(Model)
            actors = {"plain": plain.remote(), "hosted": freezable(Model).remote()}
            found = measure(actors, options.calls, options.mib << 20, options.rounds)
        finally:
            ray.shutdown()
    judged = judge(found)
    summed = {
        name: {key: machine.summary(values) for key, values in found[name].items()}
        for name in ("plain", "hosted")
    }
    result = machine.new_result("ray_calls", rehearsal=options.rehearse) | {
        "mib": options.mib,
        "ray": ray.__version__,
        "judged": judged,
        "memcpy_ms": machine.summary(found["memcpy_ms"]),
        **summed,
    }
    path = machine.save(machine.file_name(result), result, options.out)
    print("\n".join(f"{name}: {value}" for name, value in judged.items()), f"\nsaved as {path}")
    good = (
        judged["tiny_over_plain_ms"] <= MAX_OVER_PLAIN_MS
        and judged["in_share_of_memcpy"] >= MIN_IN
        and judged["out_share_of_memcpy"] >= MIN_OUT
    )
    return 0 if good or options.rehearse else 1


if __name__ == "__main__":
    sys.exit(main())
