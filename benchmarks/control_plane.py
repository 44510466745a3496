"""What gpusched itself costs, without a GPU: status under load, the command line, freezes beside the driver's time.

    python benchmarks/control_plane.py [--processes 500] [--samples 2000] [--out DIR]

A private daemon on simulated GPUs. The driver's own time is in every result, so what is left over is ours: reading
/proc, the journal's fsync, the way to the helper process and back. Leave the machine alone meanwhile.

Bars: status p99 < 5 ms with 500 managed processes and 8 slow freezes; `gpusched status` < 150 ms; freeze and thaw
<= 10 ms above the driver's calls. The exit code is 1 when a median or percentile misses its bar.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import machine
from gpusched.client import GpuSched
from gpusched.daemon import sim_directory
from gpusched.demo import private_daemon, wait_for_lines
from gpusched.mechanisms.sim.script import Script

#: (result, statistic) -> the most that it may be, in milliseconds.
BARS = {
    ("status_under_load_ms", "p99"): 5.0,
    ("status_command_ms", "median"): 150.0,
    ("freeze_over_driver_ms", "median"): 10.0,
    ("thaw_over_driver_ms", "median"): 10.0,
    ("freeze_over_driver_loaded_ms", "median"): 10.0,
    ("thaw_over_driver_loaded_ms", "median"): 10.0,
}
SLOW_FREEZES = 8
WORKLOAD = [sys.executable, "-m", "gpusched.workload", "--vram", "8M"]


def timed_ms(act: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = act()
    return (time.perf_counter() - begun) * 1000, result


def figures(values_ms: Sequence[float]) -> dict[str, float]:
    """Median, percentiles and extremes."""
    ordered = sorted(values_ms)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

    return machine.summary(ordered) | {"p50": at(0.5), "p99": at(0.99)}


def moves(client: GpuSched, rounds: int) -> tuple[list[float], list[float]]:
    """Freezes and thaws the small workload; what each took beyond the driver's own calls, as the client sees it."""
    over: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 3):
        acts: tuple[Callable[[str], Any], ...] = (client.freeze, client.thaw)
        for act, into in zip(acts, over, strict=True):
            wall_ms, result = timed_ms(partial(act, "small"))
            if number >= 3:  # the first ones warm up
                into.append(wall_ms - result["driver_ms"])
    return over


def statuses(path: str, count: int) -> list[float]:
    """The time of each of ``count`` status requests, one after the other on one connection."""
    times = []
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as lines:
        connection.connect(path)
        for _ in range(count):
            begun = time.perf_counter()
            connection.sendall(b'{"method":"status"}\n')
            line = lines.readline()
            times.append((time.perf_counter() - begun) * 1000)
            if not line.startswith(b'{"ok":true'):
                raise SystemExit(f"status failed: {line[:200]!r}")
    return times


def under_load(client: GpuSched, samples: int) -> list[float]:
    """Status while slow freezes run; every one of them is still running when the last status was answered."""
    script = Script(sim_directory(Path(client.socket_path).parent / "state"))
    names = [f"slow-{n}" for n in range(SLOW_FREEZES)]
    for name in names:
        client.run(name, WORKLOAD)
    for name in names:
        wait_for_lines(client, name, 1)
    script.add("checkpoint", delay_s=30.0, times=None)
    freezes = [
        threading.Thread(target=GpuSched(client.socket_path).freeze, args=(n,)) for n in names
    ]
    for thread in freezes:
        thread.start()
    while sum(p["state"] == "freezing" for p in client.processes()) < SLOW_FREEZES:
        time.sleep(0.05)
    times = statuses(client.socket_path, samples)
    still = sum(p["state"] == "freezing" for p in client.processes())
    if still < SLOW_FREEZES:
        raise SystemExit(
            f"only {still} freezes were still running at the end; ask for fewer --samples"
        )
    for thread in freezes:
        thread.join()
    script.clear()
    for name in names:
        client.kill(name)
    return times


def commands(path: str, runs: int) -> list[float]:
    """The whole command ``gpusched status``, from start to exit."""
    program = Path(sys.executable).with_name("gpusched")
    start = [str(program)] if program.exists() else [sys.executable, "-m", "gpusched"]
    command = [*start, "-s", path, "status"]
    times = []
    for _ in range(runs + 2):
        took_ms, _ = timed_ms(
            lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        )
        times.append(took_ms)
    return times[2:]


def measure(client: GpuSched, processes: int, samples: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    client.run("small", WORKLOAD)
    wait_for_lines(client, "small", 2)
    found["freeze_over_driver_ms"], found["thaw_over_driver_ms"] = moves(client, 30)
    found["status_command_ms"] = commands(client.socket_path, 10)
    found["status_ms"] = statuses(client.socket_path, samples)
    found["run_ms"] = [
        timed_ms(partial(client.run, f"sleep-{n}", ["sleep", "100000"], env={}, dir="/"))[0]
        for n in range(processes)
    ]
    loaded = moves(client, 30)
    found["freeze_over_driver_loaded_ms"], found["thaw_over_driver_loaded_ms"] = loaded
    found["status_command_loaded_ms"] = commands(client.socket_path, 10)
    found["status_under_load_ms"] = under_load(client, samples)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=500)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "control_plane",
        "simulated": True,
        "machine": machine.describe()
        | {"load_before": os.getloadavg(), "niceness": os.getpriority(os.PRIO_PROCESS, 0)},
        "processes": options.processes,
        "slow_freezes": SLOW_FREEZES,
    }
    with private_daemon("sim", "4G") as client:
        measured = measure(client, options.processes, options.samples)
    result["results"] = {name: figures(values) for name, values in measured.items()}
    missed = []
    print(f"{'milliseconds':32} {'median':>8} {'p99':>8} {'min':>8} {'max':>8}   bar")
    for name, row in result["results"].items():
        bars = {s: bar for (of, s), bar in BARS.items() if of == name}
        missed += [f"{name} {s} {row[s]} > {bar}" for s, bar in bars.items() if row[s] > bar]
        cells = " ".join(f"{row[key]:8.2f}" for key in ("median", "p99", "min", "max"))
        print(f"{name:32} {cells}   {', '.join(f'{s} {bar:g}' for s, bar in bars.items())}")
    result["missed"] = missed
    path = machine.save(f"control_plane-{time.strftime('%Y-%m-%d')}", result, options.out)
    print(f"saved {path}")
    for text in missed:
        print(f"MISSED: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
