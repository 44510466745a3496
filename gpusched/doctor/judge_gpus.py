"""Findings on the driver, NVML, the checkpoint calls and the GPUs' modes. Pure."""

from __future__ import annotations

import re
from typing import Final

from gpusched.doctor.findings import Finding, fail, ok, warn
from gpusched.doctor.readings import GpuFacts, Gpus, Host
from gpusched.mechanisms.cuda.driver import OLDEST_DRIVER, SUPPORTED_DRIVER
from gpusched.units import format_size

_INSTALL: Final = (
    f"install the NVIDIA driver {SUPPORTED_DRIVER} or newer and reboot (Ubuntu: sudo apt-get install "
    f"nvidia-headless-{SUPPORTED_DRIVER}-server nvidia-utils-{SUPPORTED_DRIVER}-server); "
    "without a GPU: --backend sim simulates some"
)
_INTO_CONTAINER: Final = (
    "give this container the host's driver: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ... "
    "(needs the NVIDIA Container Toolkit on the host); without a GPU: --backend sim simulates some"
)


def judge(gpus: Gpus, host: Host | None, *, allow_old_driver: bool) -> list[Finding]:
    """``host`` matters for the advice alone: a container gets its driver from its host."""
    container = host is not None and host.container is not None
    return [
        _driver(gpus, allow_old_driver=allow_old_driver, container=container),
        _nvml(gpus),
        _devices(gpus),
        _checkpoint(gpus),
        _persistence(gpus),
        _mig(gpus),
        _mps(gpus),
    ]


def _driver(gpus: Gpus, *, allow_old_driver: bool, container: bool) -> Finding:
    version = gpus.driver_version or gpus.module_version
    if version is None:
        if container:
            return fail("driver", "no NVIDIA driver in this container", _INTO_CONTAINER)
        return fail("driver", "no NVIDIA driver is loaded", _INSTALL)
    match = re.match(r"\d+", version)
    if match is None:
        return fail("driver", f"the version is not understood: {version!r}", _INSTALL)
    major = int(match[0])
    # A container's driver is its host's; installing one inside would not help.
    where = "on the container's host " if container else ""
    upgrade = f"{where}{_INSTALL.partition(';')[0]}"
    if major < OLDEST_DRIVER:
        return fail("driver", f"{version} has no checkpoint calls", upgrade)
    if major < SUPPORTED_DRIVER:
        lack = f"{version} may lose a process when a checkpoint fails, and cannot migrate"
        if allow_old_driver:
            return warn("driver", f"{lack} (allowed by --allow-old-driver)", upgrade)
        return fail("driver", lack, f"{upgrade}, or start the daemon with --allow-old-driver")
    return ok("driver", version)


def _nvml(gpus: Gpus) -> Finding:
    if gpus.nvml_error is not None:
        return fail("nvml", gpus.nvml_error, _nvml_fix(gpus))
    if gpus.driver_version is None:
        return fail(
            "nvml",
            gpus.unfinished or "no answer",
            "see whether nvidia-smi works, and: sudo dmesg | grep -i nvrm",
        )
    if not gpus.gpus:
        return fail(
            "nvml",
            "the driver sees no GPU",
            "see whether nvidia-smi -L lists one, and: lspci | grep -i nvidia",
        )
    listed = ", ".join(f"{g.index}: {g.name} {format_size(g.total_bytes)}" for g in gpus.gpus)
    return ok("nvml", f"{len(gpus.gpus)} GPU{'s' * (len(gpus.gpus) > 1)} ({listed})")


def _nvml_fix(gpus: Gpus) -> str:
    error = gpus.nvml_error or ""
    if "nvidia-ml-py" in error:
        return "install gpusched with its dependencies: pip install nvidia-ml-py"
    if "mismatch" in error:
        return "the driver was updated under the running kernel module: reboot"
    if "ermission" in error:
        return "sudo gpusched doctor; or let this user open /dev/nvidia*"
    if gpus.module_version is not None:
        return (
            f"the kernel module {gpus.module_version} is loaded but its library cannot be used: install "
            "libnvidia-compute and libnvidia-ml of that version (container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        )
    return "install the driver first (see driver)"


def _devices(gpus: Gpus) -> Finding:
    if gpus.denied_devices:
        return fail(
            "devices",
            f"this user may not open {', '.join(gpus.denied_devices)}",
            "run as root, or join the group that owns them: ls -l /dev/nvidia*",
        )
    return ok("devices", "every device file of the driver that is there may be opened")


def _checkpoint(gpus: Gpus) -> Finding:
    name = "checkpoint_api"
    if gpus.unfinished is not None:
        return fail(
            name, gpus.unfinished, "see whether nvidia-smi works, and: sudo dmesg | grep -i nvrm"
        )
    if gpus.bindings_version is None:
        found = gpus.cuda_error or "cuda-bindings cannot be imported"
        return fail(
            name, found, "install gpusched with its dependencies: pip install 'cuda-bindings>=12.8'"
        )
    if gpus.missing_calls:
        return fail(
            name,
            f"missing: {', '.join(gpus.missing_calls)}",
            f"update both: the driver to {SUPPORTED_DRIVER} or newer, and pip install -U 'cuda-bindings>=12.8'",
        )
    if gpus.cuda_error is not None:
        fix = "see whether nvidia-smi works and CUDA_VISIBLE_DEVICES is unset, and: sudo dmesg | grep -i nvrm"
        if gpus.driver_version is None:
            fix = "install the driver first (see driver)"
        return fail(name, gpus.cuda_error, fix)
    return ok(name, f"all calls present; cuda-bindings {gpus.bindings_version}; cuInit succeeds")


def _persistence(gpus: Gpus) -> Finding:
    off = [gpu for gpu in gpus.gpus if gpu.persistence is False]
    if off:
        return warn(
            "persistence",
            f"off on GPU {_indices(off)}: the first CUDA call waits for the GPU to start",
            "sudo nvidia-smi -pm 1",
        )
    return ok("persistence", "on" if gpus.gpus else "no GPU to ask")


def _mig(gpus: Gpus) -> Finding:
    on = [gpu for gpu in gpus.gpus if gpu.mig]
    if not on:
        return ok("mig", "off" if gpus.gpus else "no GPU to ask")
    found = f"on for GPU {_indices(on)}: processes there cannot be frozen"
    fix = f"end what runs there, then: sudo nvidia-smi -i {_indices(on)} -mig 0"
    return fail("mig", found, fix) if len(on) == len(gpus.gpus) else warn("mig", found, fix)


def _mps(gpus: Gpus) -> Finding:
    if gpus.mps_pids:
        return warn(
            "mps",
            f"the MPS daemon runs (pid {', '.join(map(str, gpus.mps_pids))}): its clients cannot be frozen",
            "end its clients, then: echo quit | sudo nvidia-cuda-mps-control",
        )
    return ok("mps", "not running")


def _indices(gpus: list[GpuFacts]) -> str:
    return ",".join(str(gpu.index) for gpu in gpus)
