"""What the preloaded library costs a program that does nothing but launch, and one that does nothing but allocate.

    python benchmarks/preload_cost.py [--rounds 3] [--out DIR]

The calls of ``preload_cost.c``, by the library and by the driver's own functions by turns within one process, so that a
drift of the machine meets both; a process for each round. Microseconds a launch, or an allocation with its free.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from gpusched.preload import library

SOURCE = Path(__file__).with_suffix(".c")
TURNS = 60


def build(program: Path) -> None:
    """Raises CalledProcessError, and FileNotFoundError where there is no compiler."""
    compiler = shutil.which("cc") or "gcc"
    command = [compiler, "-O2", "-std=gnu11", "-Wall", "-o", str(program), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, timeout=60)


def once(program: Path, preload: str, turns: int = TURNS) -> dict[str, dict[str, list[float]]]:
    """What each loop took, turn by turn, "with" and "without" the library. Raises CalledProcessError."""
    ended = subprocess.run(
        [program, str(turns)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"LD_PRELOAD": preload},
    )
    found: dict[str, dict[str, list[float]]] = json.loads(ended.stdout)
    return found


def share_added(runs: list[dict[str, Any]], what: str) -> float:
    """The median share that the library adds, over all turns, each compared with its own neighbour."""
    shares: list[float] = [
        with_ / without - 1
        for run in runs
        for without, with_ in zip(run[what]["without"], run[what]["with"], strict=True)
    ]
    return statistics.median(shares)


def median_us(runs: list[dict[str, Any]], what: str, which: str) -> float:
    times: list[float] = [each for run in runs for each in run[what][which]]
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    options = parser.parse_args()
    preload = library()
    if not preload:
        sys.exit("preload_cost.py: the library was not built: install a C compiler, then gpusched")
    result: dict[str, Any] = machine.new_result("preload_cost", rehearsal=False)
    result["runs"] = []
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "preload_cost"
        build(program)
        for _ in range(options.rounds):
            result["runs"].append(once(program, preload))
    for what in result["runs"][0]:
        without, with_ = (median_us(result["runs"], what, which) for which in ("without", "with"))
        share = share_added(result["runs"], what)
        print(f"{what:27} without {without:8.3f} us  with {with_:8.3f} us  {share:+.2%}")
    print(f"saved {machine.short(machine.save(machine.file_name(result), result, options.out))}")


if __name__ == "__main__":
    main()
