"""What ``status`` says: the node as the wire describes it. Reads only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Final, cast

from msgspec import Raw, json

from gpusched import types
from gpusched.domain.states import ProcState, tier_of
from gpusched.engine.core import Core, rfc3339
from gpusched.engine.model import Process
from gpusched.engine.survey import Sample
from gpusched.units import MIB, format_age, mib

#: How old the list of processes may be when nothing has happened since: only the ages in it move on.
LIST_AGE_S: Final = 0.1


class Reporter:
    """Makes the result of ``status``. Clients poll it, so nothing is rendered again while it says the same.

    The list of processes is kept, encoded, until an event is handled (all that changes the node is one), a new
    sample of VRAM comes or LIST_AGE_S have passed; what a record of a process says, until the record changes.
    """

    def __init__(self, core: Core, version: str) -> None:
        self._core = core
        self._version = version
        self._rendered: dict[str, tuple[Process, types.ProcessStatus]] = {}
        self._list: tuple[tuple[int, float], float, Raw] | None = None

    def status(self, sample: Sample) -> types.Status:
        """The node as it is now; ``sample`` is the VRAM as last seen."""
        core = self._core
        capabilities: types.Capabilities = {
            "cuda_checkpoint": True,
            "criu": not core.ports.disk.why_not(),
            "driver_version": core.description.driver_version,
            "backend": core.description.backend,
            "simulated": core.description.simulated,
            "migrate": core.description.can_migrate,
        }
        return {
            "gpus": _gpus(core, sample),
            "processes": cast("list[types.ProcessStatus]", self._encoded_processes(sample)),
            "memory": _memory(core),
            "metrics": _metrics(core),
            "recent_events": list(core.events.recent),
            "capabilities": capabilities,
            "version": self._version,
            "pid": os.getpid(),
        }

    def _encoded_processes(self, sample: Sample) -> Raw:
        """The list as JSON: 500 processes cost milliseconds to list and as much again to encode."""
        key, now_s = (self._core.handled, sample.taken_s), self._core.monotonic_s
        if self._list is None or self._list[0] != key or now_s - self._list[1] > LIST_AGE_S:
            self._list = key, now_s, Raw(json.encode(self._processes(sample)))
        return self._list[2]

    def _processes(self, sample: Sample) -> list[types.ProcessStatus]:
        core, now = self._core, self._core.unix_s
        leases = Counter(lease.tree_id for lease in core.node.leases.values())
        before, self._rendered = self._rendered, {}
        found: list[types.ProcessStatus] = []
        for tree_id, process in core.node.processes.items():
            entry = before.get(tree_id)
            if entry is None or entry[0] is not process:
                entry = process, _render(core, process)
            self._rendered[tree_id] = entry
            status = entry[1].copy()
            held = sample.held.get(tree_id, {})
            status["mem_mb"] = mib(_vram_bytes(process, held))
            status["age"] = format_age(now - process.started_unix_s)
            status["leases"] = leases[tree_id] + sum(
                lease.expires_unix_s > now for lease in process.timed_leases
            )
            if op := core.node.operations.get(core.node.busy.get(tree_id, "")):
                status["op"] = op.kind
            if not process.gpus and held:
                status["gpus"] = [core.gpus[u].index for u in sorted(held) if u in core.gpus]
                status["gpu"] = status["gpus"][0] if status["gpus"] else -1
            found.append(status)
        return found


def _gpus(core: Core, sample: Sample) -> list[types.GpuStatus]:
    found: list[types.GpuStatus] = []
    for gpu in core.gpus.values():
        memory = sample.usage.gpus.get(gpu.uuid)
        used = memory.used_bytes if memory else 0
        free = memory.free_bytes if memory else gpu.total_bytes
        found.append(
            {
                "index": gpu.index,
                "name": gpu.name,
                "mem_total_mb": gpu.total_bytes // MIB,
                "mem_used_mb": used // MIB,
                "mem_free_mb": free // MIB,
                "uuid": gpu.uuid,
            }
        )
    return found


def _vram_bytes(process: Process, held: Mapping[str, int]) -> int:
    match process.state:
        case ProcState.DEAD:
            return 0
        case ProcState.STARTING | ProcState.ACTIVE | ProcState.FAILED:
            return sum(held.values())
        case _:
            return process.vram_bytes


def _render(core: Core, process: Process) -> types.ProcessStatus:
    """What the record of a process says; what changes without it (memory, age, leases, op) is filled in later."""
    gpus = [core.gpus[u].index for u in process.gpus if u in core.gpus]
    exit_ = process.exit
    return {
        "name": process.name,
        "pid": process.main.pid if process.main else 0,
        "state": process.state.value,
        "gpu": gpus[0] if gpus else -1,
        "mem_mb": 0,
        "age": "",
        "started": rfc3339(process.started_unix_s),
        "tier": tier_of(process.state).value,
        "gpus": gpus,
        "user": process.user,
        "uid": process.uid,
        "adopted": process.adopted,
        "isolated": process.isolated,
        "own_network": process.own_network,
        "evictable": process.evictable,
        "stop": process.stop,
        "context_mb": mib(sum(process.kept.values())) if process.state is ProcState.FROZEN else 0,
        "leases": 0,
        "op": None,
        "exit_code": exit_.code if exit_ else None,
        "exit_signal": exit_.signal if exit_ else None,
        "error": process.error,
    }


def _memory(core: Core) -> types.MemoryStatus:
    ram = core.ports.host.ram()
    return {
        "host_ram_total_mb": ram.total_bytes // MIB,
        "host_ram_free_mb": ram.available_bytes // MIB,
        "host_ram_budget_mb": core.ram_budget_bytes() // MIB,
        "snapshots_mb": core.snapshots_bytes() // MIB,
        "disk_used_mb": mib(core.ports.disk.room().used_bytes),
        "disk_budget_mb": core.limits.disk_budget_bytes // MIB,
    }


def _metrics(core: Core) -> types.Metrics:
    c = core.node.counters
    return {
        "requests": c.requests,
        "cache_hits": c.cache_hits,
        "freezes": c.freezes,
        "thaws": c.thaws,
        "forks": c.forks,
        "migrations": c.migrations,
        "hibernations": c.hibernations,
        "cold_starts": c.cold_starts,
        "avg_freeze_ms": round(c.freeze_ms / c.freezes) if c.freezes else 0,
        "avg_thaw_ms": round(c.thaw_ms / c.thaws) if c.thaws else 0,
    }
