"""What the preloaded library costs a program that does nothing but launch, and one that does nothing but allocate.

    python benchmarks/preload_cost.py [--rounds 5] [--out DIR]

PyTorch launches a tiny kernel without pause; ``cuMemAlloc`` and ``cuMemFree`` of several sizes follow each other. In
processes of their own, with and without the library by turns, so that a drift of the machine meets both. Microseconds a
launch, or a pair of calls: the least of several loops in a process, and of those the median over the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
from gpusched.mechanisms.cuda import pool_home

SIZES_MIB = (1, 2, 20, 512)
PROGRAM = """
import json, sys, time
import torch
from cuda.bindings import driver as cuda
x = torch.zeros(256, device="cuda")
def launch(count):
    for _ in range(count):
        x.add_(1)
    torch.cuda.synchronize()
def allocate(size):
    def loop(count):
        for _ in range(count):
            result, address = cuda.cuMemAlloc(size)
            assert int(result) == 0
            cuda.cuMemFree(address)
    return loop
def least(loop, count, times):
    loop(count)
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        loop(count)
        found.append((time.perf_counter() - begun) / count * 1e6)
    return min(found)
found = {"launch": least(launch, 20000, 9)}
for mib in json.loads(sys.argv[1]):
    found[f"alloc {mib} MiB"] = least(allocate(mib << 20), 200, 5)
print(json.dumps(found))
"""


def once(python: str, preload: str) -> dict[str, float]:
    command = [python, "-c", PROGRAM, json.dumps(SIZES_MIB)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"LD_PRELOAD": preload},
    )
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-python", default=sys.executable, help="one that has PyTorch")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    options = parser.parse_args()
    result: dict[str, Any] = machine.new_result("preload_cost", rehearsal=False)
    result["runs"] = {"without": [], "with": []}
    name = machine.file_name(result)
    for _ in range(options.rounds):
        for which, preload in (("without", ""), ("with", pool_home.library())):
            result["runs"][which].append(once(options.torch_python, preload))
            machine.save(name, result, options.out)
    for what in result["runs"]["with"][0]:
        without, with_ = (
            statistics.median(run[what] for run in result["runs"][which])
            for which in ("without", "with")
        )
        print(
            f"{what:15} without {without:8.3f} us  with {with_:8.3f} us  {with_ / without - 1:+.2%}"
        )
    print(f"saved {machine.short(machine.save(name, result, options.out))}")


if __name__ == "__main__":
    main()
