"""Reading the GPU side: ``gpu_probe.py`` in a process with a time limit, and what /proc and /dev say beside it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from gpusched.doctor.readings import GpuFacts, Gpus
from gpusched.mechanisms import programs

#: cuInit takes seconds on a machine with several GPUs and without persistence mode.
PROBE_TIMEOUT_S: Final = 30.0
_PARTS: Final = ("NVML", "the CUDA bindings", "cuInit")
_MODULE_VERSION: Final = re.compile(r"Kernel Module\D*(?:for \w+\s+)?(\d+(?:\.\d+)+)")
_MPS_COMM: Final = "nvidia-cuda-mps"  # the kernel keeps 15 characters of a name


def read(timeout_s: float = PROBE_TIMEOUT_S) -> Gpus:
    """Blocks for at most ``timeout_s`` and a little."""
    ran = programs.run([sys.executable, "-P", "-m", "gpusched.doctor.gpu_probe"], timeout_s)
    module = _module_version()
    return parse(
        ran,
        module_version=module,
        denied_devices=_denied_devices(),
        mps_pids=_pids_of(_MPS_COMM),
    )


def parse(ran: programs.Ran, **beside: Any) -> Gpus:
    """What the probe printed, as far as it got; ``beside`` are the other fields."""
    parts: list[dict[str, Any]] = []
    for line in ran.stdout.splitlines():
        try:
            parts.append(json.loads(line))
        except ValueError:
            break  # ended in the middle of a line
    found: dict[str, Any] = {}
    for part in parts:
        found.update(part)
    if len(parts) < len(_PARTS):
        how = "does not answer" if ran.code is None else f"ends the program ({ran.complaint})"
        found["unfinished"] = f"{_PARTS[len(parts)]} {how}"
    found["gpus"] = tuple(GpuFacts(**gpu) for gpu in found.get("gpus", ()))
    found["missing_calls"] = tuple(found.get("missing_calls", ()))
    return Gpus(**{**beside, **found})


def parse_module_version(text: str) -> str | None:
    """``"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05 ..."`` -> ``"580.95.05"``."""
    match = _MODULE_VERSION.search(text)
    return match[1] if match else None


def _module_version() -> str | None:
    try:
        return parse_module_version(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None


def _denied_devices(directory: Path = Path("/dev")) -> tuple[str, ...]:
    nodes: Iterable[Path] = sorted(directory.glob("nvidia[0-9]*"))
    nodes = [*nodes, directory / "nvidiactl", directory / "nvidia-uvm"]
    return tuple(str(n) for n in nodes if n.exists() and not os.access(n, os.R_OK | os.W_OK))


def _pids_of(comm: str) -> tuple[int, ...]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "comm").read_text().rstrip("\n")
            except OSError:
                continue  # it ended meanwhile
            if name == comm:
                found.append(int(entry.name))
    return tuple(sorted(found))
