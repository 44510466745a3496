"""Two hosted models that change places many times: their contents, and what must not grow meanwhile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gpusched.client import GpuSched
from ray_cluster import get
from ray_integration import status, swap


def held(models: dict[str, Any], client: GpuSched) -> dict[str, int]:
    """Memory in KiB and descriptors of every process of the models, and the VRAM of GPU 0 in MiB."""
    found: dict[str, int] = {}
    for name, each in zip(models, get(status(list(models.values()))), strict=True):
        for what, pid in (("host", each["pid"]), ("proxy", each["calls"]["proxy_pid"])):
            text = Path(f"/proc/{pid}/status").read_text()
            rss = re.search(r"^VmRSS:\s+(\d+)", text, re.M)
            assert rss is not None
            found[f"{what} of {name}: KiB"] = int(rss[1])
            found[f"{what} of {name}: descriptors"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    found["GPU 0: MiB"] = client.status()["gpus"][0]["mem_used_mb"]
    return found


def swaps(
    models: dict[str, Any], client: GpuSched, cycles: int, *, warm_up: int = 5
) -> dict[str, tuple[int, int]]:
    """There and back ``cycles`` times; the second of the two models is on the GPU before and after.

    Each is asked for the digest of its VRAM after each thaw; AssertionError where it is not what it was. Returns what
    was held after the warm-up and at the end.
    """
    (first, second) = models.values()
    right = {id(second): get(second.digest.remote())}
    get(swap(second, first))
    right[id(first)] = get(first.digest.remote())
    get(swap(first, second))
    before: dict[str, int] = {}
    for number in range(warm_up + cycles):
        if number == warm_up:
            before = held(models, client)
        for off, on in ((second, first), (first, second)):
            get(swap(off, on), timeout=120)
            assert get(on.digest.remote(), timeout=120) == right[id(on)], f"swap {number}"
    after = held(models, client)
    return {what: (before[what], after[what]) for what in before}


def grown(seen: dict[str, tuple[int, int]], *, slack: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What is more than it may be; ``slack``: how much each kind (KiB, descriptors, MiB) may be more."""
    return {
        what: (before, after)
        for what, (before, after) in seen.items()
        if after > before + slack[what.rsplit(" ", 1)[1]]
    }
