"""Freeze, thaw and cold start of the workload: through gpusched, by the bare driver calls, and by fresh processes.

    python benchmarks/freeze_thaw.py [--sizes 1.4,3.6,15] [--runs 3] [--out DIR] [--backend cuda|sim]

For each size (decimal GB) and way: freeze and thaw, wall time as a client sees it, median of the runs with minimum and
maximum; the contents are recomputed from VRAM after every thaw. Host RAM is touched once before, and every process is
frozen and thawed once before it is measured. "bare" are the driver's calls from one long-lived process; "fresh" the
same calls with a process started for each action. With ``--backend sim`` it tries itself out and says so in every
line: those figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

from gpusched.client import GpuSched
from gpusched.demo import digests, private_daemon, wait_for_lines
from gpusched.mechanisms.cuda.driver import CudaDriver

ONE_CALL = Path(__file__).resolve().parent / "one_call.py"
Timed = tuple[float, dict[str, Any]]


class Target:
    """One workload under the daemon, and what its contents should be."""

    def __init__(self, client: GpuSched, gigabytes: float) -> None:
        self.client, self.name = client, f"w{gigabytes:g}"
        size = f"{gigabytes * 1e9 / 2**20:.0f}M"
        command = [sys.executable, "-m", "gpusched.workload", "--vram", size]
        begun = time.monotonic()
        self.pid = client.run(self.name, command)["pid"]
        self.digest = wait_for_lines(client, self.name, 1)[0][1]
        self.cold_ms = (time.monotonic() - begun) * 1000
        wait_for_lines(client, self.name, 3)

    def verify(self) -> None:
        """Two new ticks, with the digest of the beginning. Raises where the contents have changed."""
        lines = wait_for_lines(self.client, self.name, len(digests(self.client, self.name)) + 2)
        wrong = [d for _, d in lines if d != self.digest]
        if wrong:
            raise SystemExit(f"{self.name}: contents changed: {wrong[0]} instead of {self.digest}")


def timed(act: Callable[[], Any]) -> Timed:
    begun = time.monotonic()
    result = act()
    return (time.monotonic() - begun) * 1000, result if isinstance(result, dict) else {}


class Bare:
    """The driver's calls from this process, which has called cuInit long before."""

    def __init__(self) -> None:
        self.driver = CudaDriver.open()

    def freeze(self, pid: int) -> None:
        self.driver.lock(pid, 10.0)
        self.driver.checkpoint(pid)
        os.kill(pid, signal.SIGSTOP)

    def thaw(self, pid: int) -> None:
        os.kill(pid, signal.SIGCONT)
        self.driver.restore(pid, None)
        self.driver.unlock(pid)


def fresh(action: str, pid: int) -> None:
    subprocess.run([sys.executable, "-I", "-S", str(ONE_CALL), action, str(pid)], check=True)


def measure(
    target: Target, freeze: Callable[[], Any], thaw: Callable[[], Any], runs: int
) -> dict[str, Any]:
    """``runs`` rounds of freeze, thaw, verify."""
    rows: dict[str, list[float]] = {"freeze_ms": [], "thaw_ms": []}
    extra: dict[str, list[float]] = {"freeze_over_driver_ms": [], "thaw_over_driver_ms": []}
    for _ in range(runs):
        off, on = timed(freeze), timed(thaw)
        target.verify()
        for verb, (took, result) in (("freeze", off), ("thaw", on)):
            rows[f"{verb}_ms"].append(took)
            if "driver_ms" in result:
                extra[f"{verb}_over_driver_ms"].append(took - result["driver_ms"])
    every = rows | {k: v for k, v in extra.items() if v}
    return {k: machine.summary(v) | {"all": [round(x, 1) for x in v]} for k, v in every.items()}


def one_size(client: GpuSched, gigabytes: float, runs: int, bare: Bare | None) -> dict[str, Any]:
    target = Target(client, gigabytes)
    name, pid = target.name, target.pid
    result: dict[str, Any] = {"gigabytes": gigabytes, "cold_start_ms": [round(target.cold_ms, 1)]}
    result["vram_mib"] = client.freeze(name)[
        "mem_mb"
    ]  # the warm-up, of all ways: it is one process
    client.thaw(name)
    target.verify()
    result["gpusched"] = measure(
        target, lambda: client.freeze(name), lambda: client.thaw(name), runs
    )
    if bare is not None:
        result["bare"] = measure(target, lambda: bare.freeze(pid), lambda: bare.thaw(pid), runs)
        result["fresh"] = measure(
            target, lambda: fresh("freeze", pid), lambda: fresh("thaw", pid), runs
        )
    client.kill(name)
    for _ in range(runs - 1):
        again = Target(client, gigabytes)
        result["cold_start_ms"].append(round(again.cold_ms, 1))
        client.kill(name)
    return result


def show(results: list[dict[str, Any]], note: str) -> None:
    print(
        f"\n{'GB':>5} {'way':10} {'freeze ms':>22} {'thaw ms':>22} {'over the driver':>18}  {note}"
    )
    for row in results:
        for way in ("gpusched", "bare", "fresh"):
            if way not in row:
                continue
            cells = [
                "{median:.0f} ({min:.0f}-{max:.0f})".format(**row[way][f"{verb}_ms"])
                for verb in ("freeze", "thaw")
            ]
            over = [
                f"{row[way][key]['median']:.1f}"
                for key in ("freeze_over_driver_ms", "thaw_over_driver_ms")
                if key in row[way]
            ]
            print(
                f"{row['gigabytes']:5g} {way:10} {cells[0]:>22} {cells[1]:>22} {' / '.join(over):>18}"
            )
        cold = machine.summary(row["cold_start_ms"])
        print(
            f"{row['gigabytes']:5g} cold start {cold['median']:.0f} ms ({cold['min']:.0f}-{cold['max']:.0f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1.4,3.6,15", help="decimal GB of VRAM")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backend", choices=("cuda", "sim"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    options = parser.parse_args()
    sizes = [float(s) for s in options.sizes.split(",")]
    simulated = options.backend == "sim"
    touched = 0.0 if simulated else machine.touch_ram(int(max(sizes) * 2.2e9) + 4 * 2**30)
    result: dict[str, Any] = {
        "benchmark": "freeze_thaw",
        "simulated": simulated,
        "machine": machine.describe(),
        "ram_touched_s": touched,
        "sizes": [],
    }
    label = "sim" if simulated else result["machine"]["gpus"][0]["name"].replace(" ", "-").lower()
    path = machine.RESULTS
    with private_daemon(options.backend, f"{max(sizes) * 1.2 * 1e9 / 2**20:.0f}M") as client:
        bare = None if simulated else Bare()
        for size in sizes:
            result["sizes"].append(one_size(client, size, options.runs, bare))
            path = machine.save(f"freeze_thaw-{label}", result, options.out)
    show(result["sizes"], "SIMULATED: these figures mean nothing" if simulated else label)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
