"""What must not grow while two models take turns: memory, descriptors, threads, VRAM, files.

Covers: swapping there and back, a count of everything before and after, and the comparison. Does not cover: the daemon
and the two workloads, which the tests bring (one test on simulated GPUs, one on real ones).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil

from daemons import PrivateDaemon
from gpusched import GpuSched
from gpusched.demo import digests, wait_for_lines
from gpusched.engine.engine import JOURNAL_LIMIT_BYTES

NAMES = ("a", "b")
#: How long what is closing may take.
SETTLE_S = 5.0


def count(daemon: PrivateDaemon, client: GpuSched) -> dict[str, int]:
    """What each process of ours holds now, and what lies on the GPUs and in the state directory."""
    status = client.status()
    workloads = {p["name"]: psutil.Process(p["pid"]) for p in status["processes"]}
    ours = {"daemon": psutil.Process(daemon.pid)}
    for child in ours["daemon"].children():
        if any("driver_host" in word for word in child.cmdline()):
            ours["driver helper"] = child
    for name in NAMES:
        supervisor = workloads[name].parent()
        assert supervisor is not None, f"{name} has no supervisor"
        ours[f"supervisor of {name}"] = supervisor
    assert len(ours) == 4, f"not all of ours were found: {ours}"
    found: dict[str, int] = {}
    for name, process in ours.items():
        found[f"{name}: RSS, KiB"] = process.memory_info().rss >> 10
        found[f"{name}: descriptors"] = process.num_fds()
        found[f"{name}: threads"] = process.num_threads()
    found["processes of the daemon"] = len(ours["daemon"].children(recursive=True))
    found["VRAM in use, MiB"] = sum(gpu["mem_used_mb"] for gpu in status["gpus"])
    found["snapshots, MiB"] = status["memory"]["snapshots_mb"]
    files = {path: path.stat().st_size for path in daemon.state_dir.rglob("*") if path.is_file()}
    found["files of state"] = len(files)
    found["journal, KiB"] = files.pop(daemon.state_dir / "journal", 0) >> 10
    found["other files of state, KiB"] = sum(files.values()) >> 10
    return found


def grown(
    before: Mapping[str, int],
    after: Mapping[str, int],
    *,
    slack_kib: int,
    noise_mib: int,
    calls: int = 0,
) -> dict[str, tuple[int, int]]:
    """What is more than it may be: (before, after) of each.

    Args:
        before: A count.
        after: Another.
        slack_kib: How much RSS each process may gain: what its allocator and its garbage collector leave for later.
        noise_mib: What else may happen in the GPU's VRAM meanwhile.
        calls: How many more calls of the driver than before may have been under way at once; the helper keeps a thread
            for each.
    """

    def most(what: str) -> int:
        if "RSS" in what:
            return before[what] + slack_kib
        if what == "driver helper: threads":
            return before[what] + calls
        if "VRAM" in what:
            return before[what] + noise_mib
        if what == "journal, KiB":  # grows to its limit, and is then written anew
            return max(before[what], (JOURNAL_LIMIT_BYTES >> 10) + 256)
        return before[what]

    return {what: (before[what], after[what]) for what in before if after[what] > most(what)}


def swaps(
    daemon: PrivateDaemon,
    cycles: int,
    *,
    vram: str,
    warm_up: int = 10,
    slack_kib: int = 2048,
    noise_mib: int = 0,
    calls: int = 0,
) -> dict[str, Any]:
    """Two workloads change places, there and back, ``cycles`` times after ``warm_up`` times that do not count.

    Returns what there was before and after. AssertionError where anything grew, or a content changed.
    """
    with daemon.client() as client:
        right = {name: start(client, name, vram, seed) for seed, name in enumerate(NAMES)}
        first: dict[str, int] = {}
        for number in range(warm_up + cycles):
            if number == warm_up:
                first = count(daemon, client)
            for off, on in (NAMES[::-1], NAMES):
                client.swap(off, on)
        deadline = time.monotonic() + SETTLE_S
        while True:
            last = count(daemon, client)
            more = grown(first, last, slack_kib=slack_kib, noise_mib=noise_mib, calls=calls)
            if not more or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        assert not more, f"grew over {cycles} swaps there and back: {more}"
        verify(client, "b", right["b"])
        client.swap("b", "a")
        verify(client, "a", right["a"])
    return {"cycles": cycles, "warm_up": warm_up, "first": first, "last": last}


def start(client: GpuSched, name: str, vram: str, seed: int) -> str:
    """Starts a workload, the first of which is frozen for the second to have room; the digest of its contents."""
    command = [sys.executable, "-m", "gpusched.workload", "--vram", vram, "--seed", str(seed)]
    client.run(name, command)
    digest = wait_for_lines(client, name, 1)[0][1]
    if name == NAMES[0]:
        client.freeze(name)
    return digest


def verify(client: GpuSched, name: str, digest: str) -> None:
    """Two more looks at VRAM; all looks so far saw the same."""
    lines = wait_for_lines(client, name, len(digests(client, name)) + 2)
    assert {found for _, found in lines} == {digest}, f"{name}: contents changed"
