"""What every result file says of the machine it came from, and how a benchmark warms it up."""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import platform
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


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
        "packages": {name: _version(name) for name in ("cuda-bindings", "nvidia-ml-py", "torch")},
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


def touch_ram(size_bytes: int) -> float:
    """Touches that much host RAM once and gives it back; returns the seconds it took, about one for each 3 GB.

    A virtual machine's first touch of a page asks its host for it, far slower than any later one. On one thread: a
    machine that is given its memory as it asks for it can be asked too fast, and ends the program instead.
    """
    begun = time.monotonic()
    with mmap.mmap(-1, size_bytes) as memory:
        for offset in range(0, size_bytes, mmap.PAGESIZE):
            memory[offset] = 1
    return round(time.monotonic() - begun, 1)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum, with the number of runs."""
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
        "runs": len(values),
    }


def save(name: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Writes ``result`` as JSON below benchmarks/results (or ``out``) and returns the path."""
    directory = out or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return path


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
