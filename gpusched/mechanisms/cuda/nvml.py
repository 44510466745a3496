"""What NVML says of GPUs and of the processes on them: identity, memory, MIG and MPS.

Covers: opening NVML, and reading it leniently (drivers leave out what they do not support). Does not cover: the
driver's checkpoint calls (``driver.py``), nor what follows from MIG or MPS (``preflight.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gpusched import errors
from gpusched.ports import Gpu, GpuMemory, Usage


class Nvml:
    """NVML, initialised; safe from many threads. Implements ``preflight.Node``."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._handles: dict[str, Any] = {}  # UUID -> handle, in PCI bus order

    @classmethod
    def open(cls) -> Nvml:
        """Raises Unsupported, with what to do, where there is no NVML. GPUs are known after ``find_gpus``."""
        try:
            import pynvml  # not a type-checked package, and not needed by the simulated backend
        except ImportError as error:
            raise errors.Unsupported(
                "nvidia-ml-py is not installed; install gpusched with its dependencies"
            ) from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise errors.Unsupported(
                f"no usable NVIDIA driver: {error}; install the NVIDIA driver, see whether nvidia-smi works, or try "
                "simulated GPUs with --backend sim"
            ) from error
        return cls(pynvml)

    def close(self) -> None:
        self._library.nvmlShutdown()

    def driver_version(self) -> str:
        return _text(self._library.nvmlSystemGetDriverVersion())

    def find_gpus(self) -> tuple[Gpu, ...]:
        """Every GPU in PCI bus order, which is what CUDA_DEVICE_ORDER=PCI_BUS_ID and people count by.

        Raises Unsupported when they cannot be listed, or when there is none.
        """
        nvml = self._library
        try:
            handles = [
                nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
            ]
            handles.sort(key=lambda handle: _text(nvml.nvmlDeviceGetPciInfo(handle).busId))
            self._handles = {_text(nvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
            gpus = tuple(
                Gpu(
                    index=index,
                    uuid=gpu,
                    name=_text(nvml.nvmlDeviceGetName(handle)),
                    total_bytes=nvml.nvmlDeviceGetMemoryInfo(handle).total,
                )
                for index, (gpu, handle) in enumerate(self._handles.items())
            )
        except nvml.NVMLError as error:
            raise errors.Unsupported(
                f"the GPUs cannot be listed: {error}; see whether nvidia-smi works"
            ) from error
        if not gpus:
            raise errors.Unsupported(
                "the NVIDIA driver sees no GPU; see whether nvidia-smi -L does"
            )
        return gpus

    def usage(self) -> Usage:
        """Blocks for some milliseconds. A process whose VRAM the driver does not tell is there with 0 bytes."""
        gpus: dict[str, GpuMemory] = {}
        processes: dict[int, dict[str, int]] = {}
        for gpu, handle in self._handles.items():
            try:
                memory = self._library.nvmlDeviceGetMemoryInfo(handle)
            except self._library.NVMLError as error:
                call = "nvmlDeviceGetMemoryInfo"
                raise errors.DriverError(
                    f"NVML does not answer for {gpu}: {error}",
                    {"call": call, "result": str(error), "gpu": gpu},
                ) from error
            gpus[gpu] = GpuMemory(
                total_bytes=memory.total, used_bytes=memory.used, free_bytes=memory.free
            )
            for process in self._compute(handle) or ():
                held = processes.setdefault(process.pid, {})
                held[gpu] = held.get(gpu, 0) + used_bytes(process)
        return Usage(gpus=gpus, processes=processes)

    def mig_pids(self) -> Collection[int]:
        found: set[int] = set()
        for handle in self._handles.values():
            try:
                current, _pending = self._library.nvmlDeviceGetMigMode(handle)
            except self._library.NVMLError:
                continue  # a GPU that knows no MIG
            if current:
                found.update(process.pid for process in self._compute(handle) or ())
        return found

    def mps_pids(self) -> Collection[int] | None:
        found: set[int] = set()
        for handle in self._handles.values():
            try:
                listed = self._library.nvmlDeviceGetMPSComputeRunningProcesses(handle)
            except self._library.NVMLError:
                return None
            found.update(process.pid for process in listed)
        return found

    def cuda_pids(self) -> Mapping[int, int]:
        counts: dict[int, int] = {}
        for handle in self._handles.values():
            for pid in {process.pid for process in self._compute(handle) or ()}:
                counts[pid] = counts.get(pid, 0) + 1
        return counts

    def _compute(self, handle: Any) -> list[Any] | None:
        """Processes with a CUDA context on a GPU; None where the driver does not list them."""
        try:
            return list(self._library.nvmlDeviceGetComputeRunningProcesses(handle))
        except self._library.NVMLError:
            return None


def used_bytes(process: Any) -> int:
    """VRAM of one listed process. None, and the "not available" of old bindings (all bits set), count as 0."""
    used = process.usedGpuMemory
    return int(used) if used is not None and 0 <= used < 2**63 else 0


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
