"""VRAM past the driver's copy: a busy and an idle PyTorch process, beside the ceiling and the driver's own calls.

    python benchmarks/line_rate.py [--sizes 1.5,3.6,15] [--once 40] [--runs 3] [--out DIR]

A program that is never at rest, and checks every step of its own (``tests/gpu/torch_busy.py``), goes off the GPU and
comes back in these ways, by turns: ``deep`` (nothing of it is left) and ``context`` (its CUDA context stays), both of
gpusched's driver helper past the driver's copy; ``bare`` (the driver's calls from one long-lived process) and ``fresh``
(the same calls, with a process started for each action: ``one_call.py``). The ceiling is a pinned copy in the same run.
Then a client's freeze and thaw through a daemon, for what daemon, engine and wire add.

Sizes are decimal GB of contents. Wall times in milliseconds; ``moved_bytes`` is what really moved, which the program's
own scratch memory adds to. The first move of a size
makes and registers the pool and does not count; its time is in the result. Host RAM is touched once before. The result
is saved after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from freeze_thaw import Bare, fresh, numbers
from gpusched.demo import private_daemon
from gpusched.doctor import pinned_copy
from gpusched.mechanisms.cuda import pool_home
from gpusched.mechanisms.cuda.direct import DirectDriver
from gpusched.mechanisms.cuda.passage import start_ticks
from gpusched.mechanisms.cuda.pool import Pool
from gpusched.preload import library, preloaded

PROGRAM = Path(__file__).resolve().parent.parent / "tests" / "gpu" / "torch_busy.py"
START_S = 120.0


class Busy:
    """One such program, with what it has said so far."""

    def __init__(self, python: str, gigabytes: float, kind: str, log: Path) -> None:
        self.log = log
        command = [python, str(PROGRAM), str(gigabytes), *(["idle"] if kind == "idle" else [])]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=preloaded(library(), os.environ),
            )
        self.pid = self.process.pid
        until = time.monotonic() + START_S
        while not self.steps():
            if time.monotonic() > until or self.process.poll() is not None:
                raise SystemExit(f"the program did not start: {log.read_text()[-500:]}")
            time.sleep(0.1)

    def steps(self) -> list[int]:
        text = self.log.read_text()
        if "WRONG" in text:
            raise SystemExit(f"a step was wrong: {text[-500:]}")
        whole = text[: text.rfind("\n") + 1]
        lines = [line for line in whole.splitlines() if line.startswith("steps")]
        return [int(count) for count in lines[-1].split()[1:]] if lines else []

    def goes_on(self) -> None:
        """Returns when every thread has done a step more, all of them right."""
        before, until = self.steps(), time.monotonic() + 30
        while not all(a < b for a, b in zip(before, self.steps(), strict=True)):
            if time.monotonic() > until or self.process.poll() is not None:
                raise SystemExit(f"it does not go on: {self.log.read_text()[-500:]}")
            time.sleep(0.05)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Ways:
    """Off and on, by name."""

    def __init__(self, home: Path) -> None:
        self.bare = Bare()
        self.direct = DirectDriver(self.bare.driver, Pool(home))

    def move(self, way: str, pid: int) -> dict[str, Any]:
        begun = time.monotonic()
        if way in {"deep", "context"}:
            self.direct.lock(pid, 10.0)
            self.direct.checkpoint(pid, keep_context=way == "context")
        elif way == "bare":
            self.bare.freeze(pid)
        else:
            fresh("freeze", pid)
        off = time.monotonic()
        row = {"off_mib": machine.used_mib(), "phases_off": dict(self.direct.last(pid).ms)}
        path = self.direct.last(pid).path
        snapshot = self.direct.pool.find(pid, start_ticks(pid))
        if snapshot is not None:
            row["moved_bytes"] = snapshot.size_bytes
        time.sleep(0.2)
        again = time.monotonic()
        if way in {"deep", "context"}:
            self.direct.restore(pid, None)
            self.direct.unlock(pid)
        elif way == "bare":
            self.bare.thaw(pid)
        else:
            fresh("thaw", pid)
        on = time.monotonic()
        if way in {"deep", "context"} and {path, self.direct.last(pid).path} != {"direct"}:
            raise SystemExit(f"{way} did not go past the driver")
        return row | {
            "freeze_ms": round((off - begun) * 1000, 2),
            "thaw_ms": round((on - again) * 1000, 2),
            "phases_on": dict(self.direct.last(pid).ms),
        }


def one_size(
    result: dict[str, Any], ways: Ways, options: argparse.Namespace, gigabytes: float, kind: str
) -> Iterator[None]:
    runs = 1 if gigabytes in options.once else options.runs
    names = ["deep", "context"] if gigabytes in options.once else options.ways
    with tempfile.TemporaryDirectory() as directory:
        program = Busy(options.torch_python, gigabytes, kind, Path(directory) / "log")
        try:
            before = machine.used_mib()
            first = ways.move("deep", program.pid)
            row: dict[str, Any] = {"gigabytes": gigabytes, "kind": kind, "first": first, "ways": {}}
            row["used_mib"] = before
            result["rows"].append(row)
            for _ in range(runs):
                for way in names:
                    program.goes_on()
                    row["ways"].setdefault(way, []).append(ways.move(way, program.pid))
                    program.goes_on()
                    yield
        finally:
            program.end()


def through_a_daemon(result: dict[str, Any], options: argparse.Namespace) -> None:
    """What a client waits for beyond the helper's own calls."""
    with private_daemon("cuda", None) as client:
        client.run("busy", [options.torch_python, str(PROGRAM), "1.5", "idle"])
        until = time.monotonic() + START_S
        while "steps" not in client.logs("busy", 1)["output"]:
            if time.monotonic() > until:
                raise SystemExit(f"the program did not start: {client.logs('busy')['output']}")
            time.sleep(0.1)
        rows: list[dict[str, Any]] = []
        for _ in range(2 + options.runs * 3):
            begun = time.monotonic()
            off = client.freeze("busy")
            middle = time.monotonic()
            on = client.thaw("busy")
            end = time.monotonic()
            rows.append(
                {
                    "freeze_over_ms": (middle - begun) * 1000 - off["driver_ms"],
                    "thaw_over_ms": (end - middle) * 1000 - on["driver_ms"],
                    "paths": [off["path"], on["path"]],
                }
            )
        result["daemon"] = {
            key: machine.summary([float(row[key]) for row in rows[2:]])
            for key in ("freeze_over_ms", "thaw_over_ms")
        } | {"paths": rows[-1]["paths"]}


def show(result: dict[str, Any]) -> None:
    ceiling = result["ceiling"]
    print(f"ceiling {ceiling}")
    for row in result["rows"]:
        for way, runs in row["ways"].items():
            off = statistics.median(run["freeze_ms"] for run in runs)
            on = statistics.median(run["thaw_ms"] for run in runs)
            print(
                f"{row['gigabytes']:5g} GB {row['kind']:4} {way:8} freeze {off:8.1f} ms "
                f"({row['gigabytes'] / off * 1000:5.1f} GB/s)  thaw {on:8.1f} ms "
                f"({row['gigabytes'] / on * 1000:5.1f} GB/s)  left {runs[-1]['off_mib']} MiB"
            )
    print("daemon", result.get("daemon"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=numbers, default="1.5,3.6,15", help="decimal GB of VRAM")
    parser.add_argument("--once", type=numbers, default="40", help="more sizes, busy and once")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", default="busy,idle")
    parser.add_argument("--ways", default="deep,context,bare,fresh")
    parser.add_argument("--torch-python", default=sys.executable, help="one that has PyTorch")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    options = parser.parse_args()
    options.kinds, options.ways = options.kinds.split(","), options.ways.split(",")
    if not library():
        parser.error("the library was not built: pip builds it where a C compiler is")
    return options


def main() -> None:
    options = parse()
    result = machine.new_result("line_rate", rehearsal=False)
    largest = max([*options.sizes, *options.once])
    result["ram_touched"] = machine.touch_ram(int(largest * 2.3e9) + 4 * 2**30)
    result["ceiling"] = pinned_copy.measure(4 << 30)
    result["rows"] = []
    name = machine.file_name(result)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as ends:
        state = Path(directory)
        ways = Ways(pool_home.prepare(state))
        ends.callback(pool_home.release, state)
        ends.callback(ways.direct.pool.trim)
        ends.callback(ways.direct.close)
        for gigabytes in [*options.sizes, *options.once]:
            for kind in options.kinds if gigabytes in options.sizes else ["busy"]:
                for _ in one_size(result, ways, options, gigabytes, kind):
                    machine.save(name, result, options.out)
    through_a_daemon(result, options)
    show(result)
    print(f"saved {machine.short(machine.save(name, result, options.out))}")


if __name__ == "__main__":
    main()
