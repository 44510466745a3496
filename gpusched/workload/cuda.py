"""The workload's memory on real GPUs, through cuda-bindings: filled and digested by two small kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from gpusched.units import MIB, format_size
from gpusched.workload import content
from gpusched.workload.memory import Exit, WorkloadError, chunks

_THREADS: Final = 256
_BLOCKS_PER_PROCESSOR: Final = 8
_U64: Final = ctypes.c_uint64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """One allocation; its first word is word number ``first`` of the whole contents."""

    address: int
    count: int
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gpu:
    """One device, its context and what was loaded there. ``sum_address`` is where the digest kernel adds up."""

    context: Any
    fill: Any
    digest: Any
    blocks: int
    sum_address: int
    chunks: tuple[_Chunk, ...]


class CudaMemory:
    """VRAM on visible GPUs, an equal part on each."""

    simulated = False

    def __init__(self, size_bytes: int, devices: Sequence[int]) -> None:
        """Sets up CUDA and allocates. Raises WorkloadError: without a usable GPU, or where it does not fit."""
        self._driver = _load_driver()
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # the bindings found no libcuda
            raise WorkloadError(f"no usable NVIDIA driver: {error}") from error
        image = (resources.files("gpusched.workload") / "kernels.ptx").read_bytes() + b"\0"
        share = size_bytes // len(devices) // content.WORD_BYTES * content.WORD_BYTES
        self._gpus = []
        first = 0
        for number in devices:
            self._gpus.append(self._set_up(number, image, share, first))
            first += share // content.WORD_BYTES

    def fill(self, seed: int) -> None:
        for gpu in self._gpus:
            self._enter(gpu)
            for chunk in gpu.chunks:
                self._launch(gpu, gpu.fill, chunk.address, chunk.count, chunk.first, seed)
            self._call("cuCtxSynchronize")
        self._verify_start(seed)

    def digest(self) -> int:
        for gpu in self._gpus:  # all at work before the first is waited for
            self._enter(gpu)
            self._start_digest(gpu, gpu.chunks)
        total = 0
        for gpu in self._gpus:
            self._enter(gpu)
            total += self._read_sum(gpu)
        return total % 2**64

    def _verify_start(self, seed: int) -> None:
        """Compares the first MiB and its digest with the CPU's: a kernel that does nothing is noticed."""
        gpu = self._gpus[0]
        start = gpu.chunks[0]
        part = _Chunk(
            address=start.address, count=min(start.count, MIB // content.WORD_BYTES), first=0
        )
        self._enter(gpu)
        copied = bytearray(part.count * content.WORD_BYTES)
        self._call("cuMemcpyDtoH", copied, part.address, len(copied))
        expected = content.words(seed, 0, part.count)
        if memoryview(copied).cast("Q").tolist() != expected:
            raise WorkloadError("the GPU did not write what the CPU computes", Exit.CORRUPT)
        self._start_digest(gpu, (part,))
        if self._read_sum(gpu) != content.digest(expected, 0):
            raise WorkloadError("the GPU's digest is not what the CPU computes", Exit.CORRUPT)

    def _start_digest(self, gpu: _Gpu, parts: Sequence[_Chunk]) -> None:
        self._call("cuMemsetD8", gpu.sum_address, 0, content.WORD_BYTES)
        for part in parts:
            self._launch(gpu, gpu.digest, part.address, part.count, part.first, gpu.sum_address)

    def _read_sum(self, gpu: _Gpu) -> int:
        copied = bytearray(content.WORD_BYTES)
        self._call("cuMemcpyDtoH", copied, gpu.sum_address, len(copied))  # waits for the kernels
        return int.from_bytes(copied, "little")

    def _launch(self, gpu: _Gpu, kernel: Any, *arguments: int) -> None:
        """Both kernels take 64-bit numbers alone."""
        parameters = (arguments, (_U64,) * len(arguments))
        self._call("cuLaunchKernel", kernel, gpu.blocks, 1, 1, _THREADS, 1, 1, 0, 0, parameters, 0)

    def _set_up(self, number: int, image: bytes, size_bytes: int, first: int) -> _Gpu:
        visible = self._call("cuDeviceGetCount")
        if number >= visible:
            raise WorkloadError(f"no GPU {number}: {visible} visible (see CUDA_VISIBLE_DEVICES)")
        device = self._call("cuDeviceGet", number)
        context = self._call("cuDevicePrimaryCtxRetain", device)
        self._call("cuCtxSetCurrent", context)
        module = self._call("cuModuleLoadData", image)
        processors = self._call(
            "cuDeviceGetAttribute",
            self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            device,
        )
        return _Gpu(
            context=context,
            fill=self._call("cuModuleGetFunction", module, b"fill"),
            digest=self._call("cuModuleGetFunction", module, b"digest"),
            blocks=processors * _BLOCKS_PER_PROCESSOR,
            sum_address=self._allocate(number, content.WORD_BYTES, content.WORD_BYTES),
            chunks=self._allocate_chunks(number, size_bytes, first),
        )

    def _allocate_chunks(self, number: int, size_bytes: int, first: int) -> tuple[_Chunk, ...]:
        found = []
        for size in chunks(size_bytes):
            count = size // content.WORD_BYTES
            address = self._allocate(number, size, size_bytes)
            found.append(_Chunk(address=address, count=count, first=first))
            first += count
        return tuple(found)

    def _allocate(self, number: int, size_bytes: int, wanted_bytes: int) -> int:
        """Allocates on the current device; ``wanted_bytes`` is the whole of it, for the message."""
        success = self._driver.CUresult.CUDA_SUCCESS
        result, address = self._driver.cuMemAlloc(size_bytes)
        if result == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self._call("cuMemGetInfo")
            raise WorkloadError(
                f"out of memory on GPU {number}: {format_size(wanted_bytes)} wanted in all; for the next "
                f"{format_size(size_bytes)} there are {format_size(free)} free of {format_size(total)}",
                Exit.OUT_OF_MEMORY,
            )
        if result != success:
            raise self._error("cuMemAlloc", result)
        return int(address)

    def _enter(self, gpu: _Gpu) -> None:
        self._call("cuCtxSetCurrent", gpu.context)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls the driver; returns its value, its tuple of values, or None. Raises WorkloadError for any error."""
        result, *values = getattr(self._driver, name)(*arguments)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise self._error(name, result)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    def _error(self, name: str, result: Any) -> WorkloadError:
        return WorkloadError(f"{name} failed: {getattr(result, 'name', result)}")


def _load_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise WorkloadError(f"cuda-bindings cannot be imported: {error}") from error
    return driver
