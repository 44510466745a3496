"""What every result file says of the machine it came from, and how a benchmark warms it up."""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
#: Whose versions a result depends on.
PACKAGES = (
    "cuda-bindings",
    "nvidia-ml-py",
    "torch",
    "transformers",
    "safetensors",
    "torch-memory-saver",
)
#: Of the RAM that is touched: at a time, and what stays free for others.
_PART_BYTES = 1 << 30
_LEAVE_BYTES = 3 << 30


def describe() -> dict[str, Any]:
    """GPU, driver, kernel, cores, RAM and huge-page settings; the keys are those of the result files."""
    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "ram_gib": round(_meminfo()["MemTotal"] / 2**30, 1),
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "shmem_enabled": _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": [],
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found["gpus"].append(
                {"name": pynvml.nvmlDeviceGetName(handle), "mib": memory.total >> 20}
            )
    except Exception as error:  # noqa: BLE001 - a machine without a GPU has results too
        found["driver"] = f"none ({type(error).__name__})"
    return found


def used_mib(index: int = 0) -> int:
    """VRAM in use on a GPU, whoever holds it, as NVML counts it. 0 where there is no NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) >> 20
    except Exception:  # noqa: BLE001 - a machine without a GPU has none in use
        return 0


def touch_ram(size_bytes: int) -> dict[str, float]:
    """Touches that much host RAM once and gives it back; about one second for each 3 GB. Says how much, and how long.

    A virtual machine's first touch of a page asks its host for it, far slower than any later one. On one thread: a
    machine that is given its memory as it asks for it can be asked too fast, and ends the program instead. Stops
    early where little is left, looking anew before each part, since such a machine's memory grows meanwhile.
    """
    begun = time.monotonic()
    parts: list[mmap.mmap] = []
    while len(parts) * _PART_BYTES < size_bytes:
        if _meminfo()["MemAvailable"] < _PART_BYTES + _LEAVE_BYTES:
            break
        part = mmap.mmap(-1, _PART_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        parts.append(part)
        for offset in range(0, _PART_BYTES, mmap.PAGESIZE):
            part[offset] = 1
    for part in parts:
        part.close()
    took_s = round(time.monotonic() - begun, 1)
    return {"gib": len(parts) * _PART_BYTES / 2**30, "seconds": took_s}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum, with the number of runs."""
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
        "runs": len(values),
    }


def new_result(benchmark: str, *, rehearsal: bool) -> dict[str, Any]:
    """What every result begins with. A rehearsal's figures mean nothing, and ``save`` keeps them out of the results."""
    return {"benchmark": benchmark, "rehearsal": rehearsal, "machine": describe()}


def file_name(result: dict[str, Any]) -> str:
    """Benchmark, GPU and second: results of several runs lie beside each other."""
    where = [gpu["name"] for gpu in result["machine"]["gpus"][:1]] or ["no-gpu"]
    when = result["machine"]["time"][:19].replace(":", "")
    return re.sub(r"[^a-z0-9]+", "-", f"{result['benchmark']} {where[0]} {when}".lower())


def save(name: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Writes ``result`` as JSON below benchmarks/results (or ``out``) and returns the path.

    Whole or not at all, so that a run may be cut off at any moment. Raises ValueError for a rehearsal's.
    """
    directory = (out or RESULTS).resolve()
    if result.get("rehearsal") and directory.is_relative_to(RESULTS):
        raise ValueError("a rehearsal's figures mean nothing: give --out another directory")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    partial.replace(path)
    return path


def short(path: Path) -> str:
    """For messages: relative to the current directory where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (s.partition(":") for s in lines)
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
