"""Asks NVML and the CUDA driver what they are, in a process of its own: either may hang or crash.

    python -m gpusched.doctor.gpu_probe

Prints one JSON object a line, each when it is known, so that what hangs later hides nothing: first NVML's part, then
the bindings', then CUDA's. Creates no context and changes no setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from typing import Any, Final

CALLS: Final = tuple(
    f"cuCheckpointProcess{call}" for call in ("Lock", "Checkpoint", "Restore", "Unlock", "GetState")
)
#: The first CUDA version with these calls, as the driver writes it (12.8).
_CUDA_VERSION: Final = 12080


def main() -> None:
    for part in (_nvml, _bindings, _cuda):
        print(json.dumps(part()), flush=True)  # noqa: T201 - this is how the answer gets out


def _nvml() -> dict[str, Any]:
    try:
        import pynvml as nvml
    except ImportError as error:
        return {"nvml_error": f"nvidia-ml-py cannot be imported ({error})"}
    try:
        nvml.nvmlInit()
        found: dict[str, Any] = {"driver_version": _text(nvml.nvmlSystemGetDriverVersion())}
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        handles.sort(key=lambda handle: _text(nvml.nvmlDeviceGetPciInfo(handle).busId))
    except nvml.NVMLError as error:
        return {"nvml_error": str(error)}
    found["gpus"] = []
    for index, handle in enumerate(handles):
        try:
            found["gpus"].append(_gpu(nvml, index, handle))
        except nvml.NVMLError as error:
            return {**found, "nvml_error": f"GPU {index}: {error}"}
    return found


def _gpu(nvml: Any, index: int, handle: Any) -> dict[str, Any]:
    def ask(call: Callable[[Any], Any]) -> Any:
        try:
            return call(handle)
        except nvml.NVMLError:
            return None  # not every GPU knows every setting

    mig = ask(nvml.nvmlDeviceGetMigMode)
    persistence = ask(nvml.nvmlDeviceGetPersistenceMode)
    return {
        "index": index,
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "uuid": _text(nvml.nvmlDeviceGetUUID(handle)),
        "total_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "persistence": None if persistence is None else bool(persistence),
        "mig": None if mig is None else bool(mig[0]),
    }


def _bindings() -> dict[str, Any]:
    try:
        from cuda.bindings import driver as cuda

        version = metadata.version("cuda-bindings")
    except ImportError as error:  # PackageNotFoundError is one
        return {
            "bindings_version": None,
            "cuda_error": f"cuda-bindings cannot be imported ({error})",
        }
    return {
        "bindings_version": version,
        "missing_calls": [call for call in CALLS if not hasattr(cuda, call)],
    }


def _cuda() -> dict[str, Any]:
    """cuInit, and whether the driver itself has the calls; through the bindings, which know where to look for it."""
    try:
        from cuda.bindings import driver as cuda
    except ImportError:
        return {}  # said already
    try:
        (result,) = cuda.cuInit(0)
    except RuntimeError as error:  # the bindings found no libcuda
        return {"cuda_error": str(error).splitlines()[0]}
    if result != cuda.CUresult.CUDA_SUCCESS:
        return {"cuda_error": f"cuInit: {result.name}"}
    missing = [c for c in CALLS if not hasattr(cuda, c) or not _driver_has(cuda, c)]
    return {"missing_calls": missing} if missing else {}


def _driver_has(cuda: Any, call: str) -> bool:
    result, address, _status = cuda.cuGetProcAddress(call.encode(), _CUDA_VERSION, 0)
    return bool(result == cuda.CUresult.CUDA_SUCCESS and address)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    main()
