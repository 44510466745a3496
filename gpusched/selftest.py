"""``gpusched doctor --selftest``: the workload frozen and thawed on every GPU, its contents verified each time.

Through a private daemon, which ends with all that it started. The measure beside it is a copy between VRAM and pinned
host memory on the same GPU, the most that any freeze could reach; simulated GPUs have none. Does not cover: whether the
machine is fit at all (``doctor/``), nor figures to publish (``benchmarks/``).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Final

from gpusched.client import GpuSched
from gpusched.demo import digests, private_daemon, wait_for_lines
from gpusched.errors import GpuschedError, InsufficientGpuMemory
from gpusched.mechanisms import programs
from gpusched.units import MIB, format_size

ROUNDS: Final = 3
WORKLOAD_BYTES: Final = 1536 * MIB
SIMULATED_WORKLOAD_BYTES: Final = 192 * MIB
#: What a CUDA context takes beside the contents, generously.
_CONTEXT_BYTES: Final = 1024 * MIB
_CEILING_BYTES: Final = 1024 * MIB
_CEILING_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one GPU did. Rates are in 10^9 bytes a second; ``error`` is empty when every content was right."""

    gpu: int
    name: str
    simulated: bool
    mem_mb: int = 0
    freeze_ms: tuple[int, ...] = ()
    thaw_ms: tuple[int, ...] = ()
    ceiling_to_host_gb_s: float | None = None
    ceiling_to_device_gb_s: float | None = None
    note: str = ""  # why there is no ceiling
    error: str = ""

    @property
    def freeze_gb_s(self) -> float | None:
        return self._rate(self.freeze_ms)

    @property
    def thaw_gb_s(self) -> float | None:
        return self._rate(self.thaw_ms)

    def _rate(self, times_ms: tuple[int, ...]) -> float | None:
        if not times_ms:
            return None
        return round(self.mem_mb * MIB / 1e6 / max(1.0, statistics.median(times_ms)), 2)


def run(backend: str) -> Generator[Trial, None, None]:
    """One trial for each GPU, one after the other; ``backend`` is cuda or sim. Blocks for some seconds each.

    Raises RuntimeError, with the daemon's log, where no daemon comes up.
    """
    size_bytes = SIMULATED_WORKLOAD_BYTES if backend == "sim" else WORKLOAD_BYTES
    with private_daemon(backend, f"{2 * size_bytes // MIB}M") as client:
        for gpu in client.status()["gpus"]:
            trial = Trial(gpu=gpu["index"], name=gpu["name"], simulated=backend == "sim")
            try:
                if not trial.simulated:
                    _require_room(gpu, size_bytes + _CONTEXT_BYTES)
                    trial = _with_ceiling(trial, gpu["uuid"])
                yield _freeze_and_thaw(client, trial, size_bytes)
            except (GpuschedError, TimeoutError) as error:
                yield replace(trial, error=str(error))


def _require_room(gpu: Any, need_bytes: int) -> None:
    free = gpu["mem_free_mb"] * MIB
    if free < need_bytes:
        raise InsufficientGpuMemory(
            f"{format_size(free)} free, {format_size(need_bytes)} needed; freeze or end what runs there"
        )


def _with_ceiling(trial: Trial, uuid: str) -> Trial:
    command = [sys.executable, "-P", "-m", "gpusched.doctor.pinned_copy", str(_CEILING_BYTES)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": uuid}
    ran = programs.run(command, _CEILING_TIMEOUT_S, env)
    if ran.code != 0:
        why = "it did not end in time" if ran.code is None else ran.complaint
        return replace(trial, note=f"no pinned copy was measured: {why}")
    found = json.loads(ran.stdout)
    return replace(
        trial,
        ceiling_to_host_gb_s=found["to_host_gb_s"],
        ceiling_to_device_gb_s=found["to_device_gb_s"],
    )


def _freeze_and_thaw(client: GpuSched, trial: Trial, size_bytes: int) -> Trial:
    name = f"selftest-{trial.gpu}"
    command = [sys.executable, "-P", "-m", "gpusched.workload", "--vram", f"{size_bytes // MIB}M"]
    client.run(name, command, gpu=trial.gpu)
    try:
        expected = wait_for_lines(client, name, 1)[0][1]
        for _ in range(ROUNDS):
            frozen, thawed = client.freeze(name), client.thaw(name)
            trial = replace(
                trial,
                mem_mb=frozen["mem_mb"],
                freeze_ms=(*trial.freeze_ms, frozen["duration_ms"]),
                thaw_ms=(*trial.thaw_ms, thawed["duration_ms"]),
            )
            # Two new looks at VRAM: the first may have begun before the freeze.
            lines = wait_for_lines(client, name, len(digests(client, name)) + 2)
            if any(digest != expected for _, digest in lines):
                return replace(trial, error="the contents changed")
    except (GpuschedError, TimeoutError) as error:
        return replace(trial, error=str(error))
    finally:
        with contextlib.suppress(GpuschedError):  # the daemon's end ends it too
            client.kill(name, force=True)
    return trial
