"""Hibernate, wake and fork of one process, beside the raw bandwidth of the disk that holds the images.

    python benchmarks/hibernate.py [--backend cuda|cpu] [--gigabytes 3.6] [--runs 3] [--copies 1,2,4] [--out DIR]

``cuda``: the workload on a GPU. ``cpu``: a process with as much host memory and no GPU state; any machine. Root, and a
CRIU that works (make criu). ``--rehearse`` tries everything out on a simulated GPU and is never among the results.

Wall time as a client sees it, the median of the runs with minimum and maximum; contents are recomputed after every
wake and in every copy. ``image_*`` is what CRIU and the image store take, without the driver: dump with commit, and
restore with verification. ``share`` compares their bytes a second with the disk's own, measured in the same run with
large direct sequential I/O. Host RAM is touched once before, and one cycle is not counted. The result is saved after
every run, so that one that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from gpusched.client import GpuSched
from gpusched.demo import digests, private_daemon, wait_for_lines

#: As the workload talks, from host memory: random once, its digest for ever.
CPU_PROGRAM = """
import hashlib, os, sys, time
blocks = [os.urandom(1 << 24) for _ in range(int(sys.argv[1]) >> 24)]
def digest():
    found = hashlib.blake2b(digest_size=8)
    for block in blocks:
        found.update(block[:: 4096])
    return found.hexdigest()
print("ready digest=" + digest(), flush=True)
tick = 0
while True:
    time.sleep(0.2)
    tick += 1
    print(f"tick {tick} digest={digest()}", flush=True)
"""
_PIECE = 16 << 20
_RAW_BYTES = 4 << 30


def raw_disk(directory: Path, size: int) -> dict[str, float]:
    """Sequential direct I/O of one thread, in MB/s: what the file system under the images can do."""
    path = directory / "raw"
    data = mmap.mmap(-1, _PIECE)
    data.write(os.urandom(_PIECE))
    with contextlib.ExitStack() as stack:
        stack.callback(data.close)
        stack.callback(path.unlink)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        stack.callback(os.close, fd)
        begun = time.monotonic()
        for offset in range(0, size, _PIECE):
            os.pwrite(fd, data, offset)
        os.fsync(fd)
        written = time.monotonic()
        for offset in range(0, size, _PIECE):
            os.preadv(fd, [data], offset)
        read = time.monotonic()
    return {
        "bytes": size,
        "write_mb_s": round(size / (written - begun) / 1e6, 1),
        "read_mb_s": round(size / (read - written) / 1e6, 1),
    }


class Target:
    """One process under the daemon, and what its contents should be."""

    def __init__(self, client: GpuSched, backend: str, gigabytes: float) -> None:
        self.client, self.name = client, "w"
        size = int(gigabytes * 1e9)
        command = [sys.executable, "-m", "gpusched.workload", "--vram", f"{size >> 20}M"]
        if backend == "cpu":
            command = [sys.executable, "-c", CPU_PROGRAM, str(size)]
        client.run(self.name, command)
        self.digest = wait_for_lines(client, self.name, 1)[0][1]

    def verify(self, name: str) -> None:
        """Two new ticks with the digest of the beginning. Raises where the contents have changed."""
        lines = wait_for_lines(self.client, name, len(digests(self.client, name)) + 2)
        wrong = [d for _, d in lines if d != self.digest]
        if wrong:
            raise SystemExit(f"{name}: contents changed: {wrong[0]} instead of {self.digest}")

    def cycle(self) -> dict[str, float]:
        """Off to disk and back, verified."""
        begun = time.monotonic()
        went = self.client.hibernate(self.name)
        on_disk = time.monotonic()
        came = self.client.thaw(self.name)
        back = time.monotonic()
        self.verify(self.name)
        return {
            "hibernate_ms": (on_disk - begun) * 1000,
            "wake_ms": (back - on_disk) * 1000,
            "image_save_ms": went["phases_ms"]["save"],
            "image_revive_ms": came["phases_ms"]["revive"],
            "image_mb": went["disk_mb"] * 2**20 / 1e6,
            "driver_off_ms": went["driver_ms"],
            "driver_on_ms": came["driver_ms"],
        }

    def fork(self, count: int) -> float:
        """Seconds from the request until all copies run; each is verified and ended."""
        begun = time.monotonic()
        copies = self.client.fork(self.name, count)["copies"]
        took = time.monotonic() - begun
        for name in (self.name, *copies):
            self.verify(name)
        for name in copies:
            self.client.kill(name, force=True)
        return took


def cycles(rows: list[dict[str, float]], raw: dict[str, float]) -> dict[str, Any]:
    """What the hibernations and wakes so far say."""
    result: dict[str, Any] = {key: machine.summary([row[key] for row in rows]) for key in rows[0]}
    size = result["image_mb"]["median"]
    for way, took, disk in (
        ("save", "image_save_ms", "write_mb_s"),
        ("revive", "image_revive_ms", "read_mb_s"),
    ):
        rate = size / result[took]["median"] * 1000
        result[way] = {"mb_s": round(rate, 1), "share_of_disk": round(rate / raw[disk], 3)}
    return result


def measure(
    target: Target, runs: int, copies: list[int], raw: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """What is known, after each run."""
    target.cycle()  # the warm-up
    rows: list[dict[str, float]] = []
    found: dict[str, Any] = {}
    for _ in range(runs):
        rows.append(target.cycle())
        found = cycles(rows, raw)
        yield found
    found["fork_ms"] = {}
    for count in copies:
        took: list[float] = []
        for _ in range(runs):
            took.append(target.fork(count) * 1000)
            found["fork_ms"][str(count)] = machine.summary(took)
            yield found


@contextlib.contextmanager
def daemon(backend: str, gigabytes: float) -> Iterator[GpuSched]:
    kind = "cuda" if backend == "cuda" else "sim"
    most = f"{int(gigabytes * 6 * 1e9) >> 20}M" if kind == "sim" else None
    with private_daemon(kind, most) as client:
        yield client


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['backend']}, {result['gigabytes']:g} GB; disk {result['raw_disk']}")
    for key, value in result["measured"].items():
        if key == "fork_ms":
            for count, one in value.items():
                print(
                    f"  fork {count} copies {one['median']:10.0f} ms ({one['min']:.0f}-{one['max']:.0f})"
                )
        elif "median" in value:
            print(f"  {key:16} {value['median']:10.1f} ({value['min']:.1f}-{value['max']:.1f})")
        else:
            print(f"  {key:16} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gigabytes", type=float, default=3.6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--copies", default="1,2,4")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="simulated; needs --out")
    options = parser.parse_args()
    if options.rehearse and options.out is None:
        parser.error("a rehearsal is never among the results: give --out")
    backend = "sim" if options.rehearse else options.backend
    copies = [int(count) for count in options.copies.split(",")]
    touched = machine.touch_ram(int(options.gigabytes * (max(copies) + 2) * 1e9))
    result = machine.new_result("hibernate", rehearsal=options.rehearse)
    with tempfile.TemporaryDirectory(prefix="gpusched-raw-") as directory:
        raw = raw_disk(Path(directory), min(_RAW_BYTES, int(options.gigabytes * 1e9)))
    result |= {
        "backend": backend,
        "gigabytes": options.gigabytes,
        "ram_touched": touched,
        "raw_disk": raw,
    }
    name = machine.file_name(result)
    with daemon(backend, options.gigabytes) as client:
        target = Target(client, backend, options.gigabytes)
        for found in measure(target, options.runs, copies, raw):
            result["measured"] = found
            machine.save(name, result, options.out)
    show(result)
    print(f"saved {machine.short(machine.save(name, result, options.out))}")


if __name__ == "__main__":
    main()
