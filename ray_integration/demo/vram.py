"""GPU memory that a demonstration's model keeps its weights in: simulated, or real through cuda-bindings."""

from __future__ import annotations

import os
from typing import Any, Final, Protocol

_CHUNK_BYTES: Final = 32 * 1024 * 1024


class Vram(Protocol):
    """One allocation. Calls wait while the process is frozen."""

    def write(self, offset: int, data: bytes) -> None: ...

    def read(self, offset: int, size: int) -> bytes: ...


def allocate(size_bytes: int) -> Vram:
    """Allocates on the host's GPU, and writes all of it once. Raises what the GPU's library does when it is full."""
    memory: Vram
    if os.environ.get("GPUSCHED_SIM_DIR"):
        from gpusched.mechanisms.sim import device

        memory = device.init().allocate(size_bytes)
    else:
        memory = _CudaMemory(size_bytes)
    for offset in range(0, size_bytes, _CHUNK_BYTES):
        memory.write(offset, b"\x5a" * min(_CHUNK_BYTES, size_bytes - offset))
    return memory


class _CudaMemory:
    def __init__(self, size_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver: Any = driver
        self._call("cuInit", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", 0))
        self._call("cuCtxSetCurrent", self._context)
        self._address = int(self._call("cuMemAlloc", size_bytes))

    def write(self, offset: int, data: bytes) -> None:
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemcpyHtoD", self._address + offset, data, len(data))

    def read(self, offset: int, size: int) -> bytes:
        self._call("cuCtxSetCurrent", self._context)
        copied = bytearray(size)
        self._call("cuMemcpyDtoH", copied, self._address + offset, size)
        return bytes(copied)

    def _call(self, name: str, *arguments: Any) -> Any:
        result, *values = getattr(self._driver, name)(*arguments)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} failed: {getattr(result, 'name', result)}")
        return values[0] if values else None
