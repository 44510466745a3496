"""What must not grow while two models take turns: memory, descriptors, threads, VRAM, files.

Covers: a count of all of it, taken from /proc and the daemon's own status, and the comparison of two counts. Does not
cover: what does the swapping (the tests that use this).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import psutil

from daemons import PrivateDaemon, request

#: What a process may gain over any number of swaps: the allocator's own, no more.
SLACK_KIB = 1024


def count(daemon: PrivateDaemon, names: tuple[str, str]) -> dict[str, int]:
    """What each process of ours holds now, and what lies on the GPUs and in the state directory."""
    status = request(daemon.socket, "status")["result"]
    workloads = {p["name"]: psutil.Process(p["pid"]) for p in status["processes"]}
    ours = {"daemon": psutil.Process(daemon.pid)}
    for child in ours["daemon"].children():
        if "gpusched.mechanisms.driver_host" in child.cmdline():
            ours["driver helper"] = child
    for name in names:
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
    found["files in the state directory"] = sum(1 for _ in files(daemon.state_dir))
    found["their size, KiB"] = sum(path.stat().st_size for path in files(daemon.state_dir)) >> 10
    return found


def files(directory: Path) -> itertools.chain[Path]:
    return itertools.chain(p for p in directory.rglob("*") if p.is_file())


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What is more than before, beyond ``SLACK_KIB`` for memory and files; nothing is flat."""
    return {
        what: (before[what], after[what])
        for what in before
        if after[what] > before[what] + (SLACK_KIB if "KiB" in what else 0)
    }
