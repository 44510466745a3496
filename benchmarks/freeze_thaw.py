"""VRAM to host RAM and back: gpusched beside every other way to do it, at several sizes.

    python benchmarks/freeze_thaw.py [--sizes 1.5,3.6,15] [--once 40] [--runs 3] [--ways gpusched,bare,...] [--out DIR]

The ways, of which the first three act on the same process, the shipped workload, by turns:

- ``gpusched``: a client's freeze and thaw; the sizes of ``--once`` are measured in this way alone, and once;
- ``bare``: the driver's calls from one long-lived process;
- ``fresh``: the same calls, with a process started for each action (``one_call.py``);
- ``torch_memory_saver`` and ``torch_memory_saver_kept``, ``to_cpu``, ``pinned``: see ``torch_peer.py``.

Before them the workload's own cold start, from the request to run it until its contents are in VRAM and digested.
Sizes are decimal GB of contents; times are wall times as the caller sees them. The contents are digested on the GPU
after every run. Host RAM is touched once before, and every way goes once over a small process. What cannot be tried is
in the result with its reason. The result is saved after every run, so that one that is cut off keeps what it has.
``--rehearse`` tries everything out on simulated GPUs, says so in every line, and is never among the results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch_peer
from gpusched.client import GpuSched
from gpusched.demo import digests, private_daemon, wait_for_lines
from gpusched.errors import GpuschedError
from gpusched.mechanisms.cuda.driver import CudaDriver
from gpusched.units import MIB

HERE = Path(__file__).resolve().parent
DRIVER_WAYS = ("gpusched", "bare", "fresh")
WAYS = (*DRIVER_WAYS, *torch_peer.WAYS)
WARM_UP_GB = 0.2
#: What a CUDA context and the workload's kernels take beside the contents, generously.
CONTEXT_MIB = 1024
PEER_LIMIT_S = 300.0
Act = Callable[[], Any]


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
    command = [sys.executable, "-I", "-S", str(HERE / "one_call.py"), action, str(pid)]
    subprocess.run(command, check=True, timeout=120)


class Target:
    """One workload under the daemon, what its contents should be, and how each way moves it."""

    def __init__(self, client: GpuSched, gigabytes: float, bare: Bare | None) -> None:
        self.client, self.name = client, f"w{gigabytes:g}"
        size = f"{max(1, round(gigabytes * 1e9 / MIB))}M"
        command = [sys.executable, "-m", "gpusched.workload", "--vram", size]
        begun = time.monotonic()
        pid = self.pid = client.run(self.name, command)["pid"]
        self.digest = wait_for_lines(client, self.name, 1)[0][1]
        self.cold_start_ms = round((time.monotonic() - begun) * 1000, 2)
        self.acts: dict[str, tuple[Act, Act]] = {
            "gpusched": (lambda: client.freeze(self.name), lambda: client.thaw(self.name)),
            "fresh": (lambda: fresh("freeze", pid), lambda: fresh("thaw", pid)),
        }
        if bare is not None:
            self.acts["bare"] = (lambda: bare.freeze(pid), lambda: bare.thaw(pid))

    def is_right(self) -> bool:
        """Waits for two new looks at VRAM (the first may have begun before the freeze): both as in the beginning?"""
        lines = wait_for_lines(self.client, self.name, len(digests(self.client, self.name)) + 2)
        return all(digest == self.digest for _, digest in lines)

    def run(self, way: str) -> dict[str, Any]:
        """One freeze and one thaw in this way."""
        freeze, thaw = self.acts[way]
        freeze_ms, off = timed(freeze)
        off_mib = machine.used_mib()
        thaw_ms, on = timed(thaw)
        row = {"freeze_ms": freeze_ms, "thaw_ms": thaw_ms, "off_mib": off_mib}
        if "driver_ms" in off:
            row |= {"driver_freeze_ms": off["driver_ms"], "driver_thaw_ms": on["driver_ms"]}
            row |= {"vram_mib": off["mem_mb"]}
        return row | {"right": self.is_right()}


def timed(act: Act) -> tuple[float, dict[str, Any]]:
    begun = time.monotonic()
    result = act()
    took_ms = round((time.monotonic() - begun) * 1000, 2)
    return took_ms, result if isinstance(result, dict) else {}


class Session:
    """The result as it grows: noted, shown and saved after every run."""

    def __init__(self, out: Path | None, *, rehearsal: bool) -> None:
        self.result = machine.new_result("freeze_thaw", rehearsal=rehearsal)
        self.result |= {"rows": [], "skipped": [], "idle_mib": machine.used_mib()}
        self.result["cold_starts_ms"] = {}  # of the workload, by size
        self.rehearsal, self.out = rehearsal, out
        self.name = machine.file_name(self.result)

    def note(self, gigabytes: float, way: str, run: dict[str, Any]) -> None:
        """Adds one run. Ends the program where the contents were wrong: no figure counts then."""
        rows = self.result["rows"]
        found = [row for row in rows if (row["gigabytes"], row["way"]) == (gigabytes, way)]
        if not found:
            found = [{"gigabytes": gigabytes, "way": way, "runs": []}]
            rows.append(found[0])
        found[0]["runs"].append(run)
        self.say(
            f"{gigabytes:6g} GB  {way:24} freeze {run['freeze_ms']:9.1f} ms  thaw {run['thaw_ms']:9.1f} ms"
            f"  {'right' if run['right'] else 'WRONG'}"
        )
        self.save()
        if not run["right"]:
            raise SystemExit(f"{way} at {gigabytes:g} GB: the contents changed")

    def note_start(self, gigabytes: float, target: Target) -> None:
        """Adds one cold start: from the request to run until the contents are in VRAM and digested."""
        starts = self.result["cold_starts_ms"].setdefault(f"{gigabytes:g}", [])
        starts.append(target.cold_start_ms)
        self.say(f"{gigabytes:6g} GB  cold start {target.cold_start_ms:9.1f} ms")
        self.save()

    def skip(self, way: str, why: str, gigabytes: float | None = None) -> None:
        self.result["skipped"].append({"way": way, "gigabytes": gigabytes, "why": why})
        size = "" if gigabytes is None else f" at {gigabytes:g} GB"
        self.say(f"skipped {way}{size}: {why}")
        self.save()

    def say(self, text: str) -> None:
        print(f"{'SIMULATED  ' if self.rehearsal else ''}{text}", flush=True)

    def save(self) -> Path:
        return machine.save(self.name, self.result, self.out)


# -- the driver's ways ----------------------------------------------------------------------------


def fits(session: Session, client: GpuSched, gigabytes: float) -> bool:
    free_mib = client.gpu_free_mb(0)
    need_mib = round(gigabytes * 1e9 / MIB) + (0 if session.rehearsal else CONTEXT_MIB)
    if need_mib > free_mib:
        session.skip("gpusched", f"needs {need_mib} MiB of VRAM, {free_mib} are free", gigabytes)
    return need_mib <= free_mib


def one_size(
    session: Session,
    client: GpuSched,
    target: Target,
    size: float,
    runs: int,
    ways: Sequence[str],
) -> None:
    """Ends early where a way fails: the process is in no known state then. Other sizes have processes of their own."""
    try:
        for _ in range(runs):
            for way in ways:
                try:
                    run = target.run(way)
                except (GpuschedError, TimeoutError, subprocess.SubprocessError) as error:
                    session.skip(way, f"failed: {error}", size)
                    return
                session.note(size, way, run)
    finally:
        client.kill(target.name, force=True)


def driver_ways(session: Session, options: argparse.Namespace, ways: Sequence[str]) -> None:
    """All sizes in the ways that act on a process of ours, by turns, so that a slow drift meets all of them."""
    sizes = [(size, options.runs, ways) for size in options.sizes]
    if "gpusched" in ways:
        sizes += [(size, 1, ["gpusched"]) for size in options.once]
    backend = "sim" if session.rehearsal else "cuda"
    room = f"{round(max(size for size, _, _ in sizes) * 1.2e9 / MIB) + 512}M"
    with private_daemon(backend, room if session.rehearsal else None) as client:
        bare = Bare() if "bare" in ways else None
        if not fits(session, client, WARM_UP_GB):
            return
        warm_up = Target(client, WARM_UP_GB, bare)
        for way in ways:
            warm_up.run(way)
        client.kill(warm_up.name)
        for size, runs, these in sizes:
            if fits(session, client, size):
                target = Target(client, size, bare)
                session.note_start(size, target)
                for _ in range(runs - 1):  # as many starts as runs; the last process stays
                    client.kill(target.name)
                    target = Target(client, size, bare)
                    session.note_start(size, target)
                one_size(session, client, target, size, runs, these)


# -- PyTorch's ways -------------------------------------------------------------------------------


def torch_way(session: Session, options: argparse.Namespace, way: str) -> None:
    """All sizes in one of ``torch_peer.py``'s ways, in a process that has the GPU for itself."""
    sizes = ",".join(f"{size:g}" for size in options.sizes)
    command = [options.torch_python, str(HERE / "torch_peer.py"), way, "--sizes", sizes]
    command += ["--runs", str(options.runs), *(["--rehearse"] if session.rehearsal else [])]
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as peer,
    ):
        watchdog = threading.Timer(PEER_LIMIT_S, peer.kill)
        watchdog.start()
        try:
            assert peer.stdout is not None
            for line in peer.stdout:
                if not line.startswith("{"):
                    continue  # a library's own
                found = json.loads(line)
                if "skipped" in found:
                    session.skip(way, found["skipped"])
                else:
                    session.note(found.pop("gigabytes"), way, found)
            code = peer.wait()  # it has closed its output, or the watchdog will end it
        finally:
            watchdog.cancel()
            peer.kill()
        if code:
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or ["no complaint"])[-1]
            session.skip(way, f"ended with {code}: {last}")


# -- all ------------------------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    return sorted(float(part) for part in text.split(",") if part)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=numbers, default="1.5,3.6,15", help="decimal GB of VRAM")
    parser.add_argument("--once", type=numbers, default="40", help="more sizes, gpusched alone")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="an interpreter that has PyTorch"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="simulated; needs --out")
    options = parser.parse_args()
    options.ways = options.ways.split(",")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"no such way: {', '.join(unknown)}")
    if options.rehearse and options.out is None:
        parser.error("a rehearsal is never among the results: give --out")
    return options


def main() -> int:
    options = parse()
    session = Session(options.out, rehearsal=options.rehearse)
    ways = [way for way in DRIVER_WAYS if way in options.ways]
    if options.rehearse:
        for way in [w for w in ways if w != "gpusched"]:
            session.skip(way, "the bare calls need a real driver")
        ways = ["gpusched"] if "gpusched" in ways else []
    else:
        once = options.once if "gpusched" in ways else []
        largest = max([*options.sizes, *once], default=0)
        session.result["ram_touched"] = machine.touch_ram(int(largest * 1.15e9) + 2 * 2**30)
    if ways and (options.sizes or options.once):
        driver_ways(session, options, ways)
    for way in torch_peer.WAYS:
        if way in options.ways and options.sizes:
            torch_way(session, options, way)
    session.say(f"saved {machine.short(session.save())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
