"""One other way to take VRAM away and bring it back, measured in a process of its own. Needs PyTorch.

    python torch_peer.py torch_memory_saver|torch_memory_saver_kept|to_cpu|pinned --sizes 1.5,3.6 --runs 3

``torch_memory_saver``: its pause and resume with CPU backup, as it comes; ``_kept``: with the backup buffers kept from
one pause to the next. ``to_cpu``: a module's ``.to("cpu")``, the freed memory given back to the GPU, and
``.to("cuda")``. ``pinned``: copies into pinned host memory that is there already, and back, the most that any way
could reach; the GPU's memory is not freed. Prints a JSON line for each run, in milliseconds; the contents are digested
on the GPU after each. Where the way is not possible here: ``{"skipped": WHY}``. Started by ``freeze_thaw.py``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import machine
from torch_digest import digest

WAYS = ("torch_memory_saver", "torch_memory_saver_kept", "to_cpu", "pinned")
#: About a large parameter of a model of some billions. All sizes are multiples, so that what the allocator keeps of
#: one size is used up by the next.
TENSOR_BYTES = 100_000_000
WARM_UP_GB = 0.2


class Cannot(Exception):
    """This way cannot be tried here, and why."""


class Contents:
    """Tensors of a model's sizes, filled from a seed; the base of every way."""

    frees = True

    def __init__(self, torch: Any, device: str, size_bytes: int) -> None:
        self.torch, self.device = torch, device
        random = torch.Generator(device=device).manual_seed(1)
        with self.allocating():
            sizes = [TENSOR_BYTES] * (size_bytes // TENSOR_BYTES) + [size_bytes % TENSOR_BYTES]
            tensors = [
                torch.empty(s // 8, dtype=torch.int64, device=device).random_(generator=random)
                for s in sizes
                if s
            ]
        keep = [torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors]
        self.module = torch.nn.ParameterList(keep)

    def allocating(self) -> Any:
        return nullcontext()

    def off(self) -> None:
        raise NotImplementedError

    def on(self) -> None:
        raise NotImplementedError

    def spoil(self) -> None:
        """Between off and on, not timed: whatever makes an ``on`` that does nothing show."""

    def digest(self) -> str:
        return digest(self.torch, self.module)

    def settle(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


class ToCpu(Contents):
    def off(self) -> None:
        self.module.to("cpu")
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def on(self) -> None:
        self.module.to(self.device)


class MemorySaver(Contents):
    kept = False

    def allocating(self) -> Any:
        self.saver = importlib.import_module("torch_memory_saver").torch_memory_saver
        self.saver.retain_cpu_backup = self.kept
        return self.saver.region(enable_cpu_backup=True)

    def off(self) -> None:
        self.saver.pause()

    def on(self) -> None:
        self.saver.resume()


class MemorySaverKept(MemorySaver):
    kept = True


class Pinned(Contents):
    frees = False
    host: Any = None  # one for all sizes: pinning takes longer than everything else here

    def _pairs(self) -> list[tuple[Any, Any]]:
        parts = [parameter.data for parameter in self.module]
        lengths = [len(part) for part in parts]
        return list(zip(parts, Pinned.host[: sum(lengths)].split(lengths), strict=True))

    def off(self) -> None:
        for tensor, host in self._pairs():
            host.copy_(tensor, non_blocking=True)

    def on(self) -> None:
        for tensor, host in self._pairs():
            tensor.copy_(host, non_blocking=True)

    def spoil(self) -> None:
        for tensor, _ in self._pairs():
            tensor.zero_()


CLASSES: dict[str, type[Contents]] = {
    "torch_memory_saver": MemorySaver,
    "torch_memory_saver_kept": MemorySaverKept,
    "to_cpu": ToCpu,
    "pinned": Pinned,
}


def prepare(way: str, device: str, largest_bytes: int) -> Any:
    """PyTorch, ready for the way. Raises Cannot. May start this program anew, with a library loaded before others."""
    try:
        torch: Any = importlib.import_module("torch")
        if way.startswith("torch_memory_saver"):
            saver = importlib.import_module("torch_memory_saver")
            if "torch_memory_saver" not in os.environ.get("LD_PRELOAD", ""):
                with saver.configure_subprocess():
                    # The library needs the CUDA runtime, which the loader finds only where PyTorch has it.
                    os.environ["LD_LIBRARY_PATH"] = ":".join(runtime_directories())
                    os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - ourselves
    except (ImportError, RuntimeError) as error:
        raise Cannot(f"{type(error).__name__}: {error}") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise Cannot("PyTorch finds no GPU")
    if device == "cpu" and way != "to_cpu":
        raise Cannot("needs a GPU")
    if way == "pinned":
        Pinned.host = torch.empty(largest_bytes // 8, dtype=torch.int64, pin_memory=True)
    return torch


def runtime_directories() -> list[str]:
    """Where the CUDA runtime of this process is, before what the loader searches anyway."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {str(Path(line.split()[-1]).parent) for line in maps if "/libcudart.so" in line}
    return [*sorted(found), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]


def timed_ms(contents: Contents, act: Callable[[], None]) -> float:
    contents.settle()
    begun = time.monotonic()
    act()
    contents.settle()
    return round((time.monotonic() - begun) * 1000, 2)


def one_run(contents: Contents, wanted: str) -> dict[str, Any]:
    """Off and on. Raises Cannot where off left the memory on the GPU: then its time says nothing."""
    on_mib = machine.used_mib()
    freeze_ms = timed_ms(contents, contents.off)
    off_mib = machine.used_mib()
    held_mib = sum(p.numel() for p in contents.module) * 8 >> 20
    if contents.frees and contents.device == "cuda" and on_mib - off_mib < 0.8 * held_mib:
        raise Cannot(f"of {held_mib} MiB only {on_mib - off_mib} left the GPU")
    contents.spoil()
    thaw_ms = timed_ms(contents, contents.on)
    right = contents.digest() == wanted
    return {"freeze_ms": freeze_ms, "thaw_ms": thaw_ms, "off_mib": off_mib, "right": right}


def one_size(torch: Any, way: str, device: str, gigabytes: float, runs: int) -> None:
    contents = CLASSES[way](torch, device, int(gigabytes * 1e9))
    wanted = contents.digest()
    if way == "torch_memory_saver_kept":
        one_run(contents, wanted)  # makes the buffers that are kept
    for _ in range(runs):
        row = one_run(contents, wanted)
        print(json.dumps({"gigabytes": gigabytes} | row), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--sizes", required=True, help="decimal GB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without a GPU")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    sizes = [float(size) for size in options.sizes.split(",")]
    try:
        torch = prepare(options.way, device, int(max([*sizes, WARM_UP_GB]) * 1e9))
        warm_up = CLASSES[options.way](torch, device, int(min(WARM_UP_GB, sizes[0]) * 1e9))
        one_run(warm_up, warm_up.digest())
        del warm_up
        for size in sizes:
            one_size(torch, options.way, device, size, options.runs)
            if device == "cuda":
                torch.cuda.empty_cache()
    except Cannot as error:
        print(json.dumps({"skipped": str(error)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
