"""How fast this GPU and its host can copy at best: between VRAM and pinned host memory, one direction at a time.

    CUDA_VISIBLE_DEVICES=GPU-... python -m gpusched.doctor.pinned_copy BYTES

Prints ``{"to_host_gb_s": N, "to_device_gb_s": N}`` (10^9 bytes a second, median of 3 after a warm-up), or exits
with 1 and the reason. A program of its own: its context and its memory are gone before anything else is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

_RUNS: Final = 3


class CallFailed(Exception):
    """A call of the CUDA driver's did not succeed."""


def main() -> int:
    try:
        print(json.dumps(measure(int(sys.argv[1]))))  # noqa: T201 - this is how the answer gets out
    except (
        CallFailed,
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: the bindings found no libcuda
        print(f"{error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def measure(size_bytes: int) -> dict[str, float]:
    """Takes that much VRAM of the first visible device, and as much pinned host memory. Blocks for some seconds."""
    from cuda.bindings import driver

    def call(name: str, *arguments: Any) -> Any:
        result, *values = getattr(driver, name)(*arguments)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise CallFailed(f"{name} failed: {getattr(result, 'name', result)}")
        return values[0] if values else None

    call("cuInit", 0)
    device = call("cuDeviceGet", 0)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", device))
    vram = call("cuMemAlloc", size_bytes)
    host = call("cuMemHostAlloc", size_bytes, 0)
    call("cuMemsetD8", vram, 1, size_bytes)
    call("cuCtxSynchronize")
    try:
        return {
            "to_host_gb_s": _rate(size_bytes, lambda: call("cuMemcpyDtoH", host, vram, size_bytes)),
            "to_device_gb_s": _rate(
                size_bytes, lambda: call("cuMemcpyHtoD", vram, host, size_bytes)
            ),
        }
    finally:
        call("cuMemFreeHost", host)
        call("cuMemFree", vram)
        call("cuDevicePrimaryCtxRelease", device)


def _rate(size_bytes: int, copy: Callable[[], object]) -> float:
    copy()
    seconds = []
    for _ in range(_RUNS):
        begun = time.perf_counter()
        copy()  # synchronous: both calls return when the bytes are there
        seconds.append(time.perf_counter() - begun)
    return round(size_bytes / statistics.median(seconds) / 1e9, 1)


if __name__ == "__main__":
    sys.exit(main())
