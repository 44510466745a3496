"""What ``status`` says: the node as the wire describes it. Reads only."""

from __future__ import annotations

import os

from gpusched import types
from gpusched.domain.states import ProcState, tier_of
from gpusched.engine.core import Core, rfc3339
from gpusched.engine.model import Process
from gpusched.engine.survey import Sample
from gpusched.units import MIB, format_age, mib


def report(core: Core, sample: Sample, version: str) -> types.Status:
    """The result of ``status``. ``sample`` is the VRAM as last seen."""
    capabilities: types.Capabilities = {
        "cuda_checkpoint": True,
        "criu": False,
        "driver_version": core.description.driver_version,
        "backend": core.description.backend,
        "simulated": core.description.simulated,
        "migrate": core.description.can_migrate,
    }
    return {
        "gpus": _gpus(core, sample),
        "processes": [_process(core, p, sample) for p in core.node.processes.values()],
        "memory": _memory(core),
        "metrics": _metrics(core),
        "recent_events": list(core.events.recent),
        "capabilities": capabilities,
        "version": version,
        "pid": os.getpid(),
    }


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


def _process(core: Core, process: Process, sample: Sample) -> types.ProcessStatus:
    held = sample.held.get(process.tree_id, {})
    match process.state:
        case ProcState.FROZEN | ProcState.FREEZING | ProcState.THAWING:
            size = process.vram_bytes
        case ProcState.DEAD:
            size = 0
        case _:
            size = sum(held.values())
    uuids = process.gpus or tuple(sorted(held))
    gpus = [core.gpus[u].index for u in uuids if u in core.gpus]
    op_id = core.node.busy.get(process.tree_id)
    exit_ = process.exit
    return {
        "name": process.name,
        "pid": process.main.pid if process.main else 0,
        "state": process.state.value,
        "gpu": gpus[0] if gpus else -1,
        "mem_mb": mib(size),
        "age": format_age(core.unix_s - process.started_unix_s),
        "started": rfc3339(process.started_unix_s),
        "tier": tier_of(process.state).value,
        "gpus": gpus,
        "user": process.user,
        "uid": process.uid,
        "adopted": process.adopted,
        "evictable": process.evictable,
        "leases": core.node.lease_count(process.tree_id, core.unix_s),
        "op": core.node.operations[op_id].kind if op_id in core.node.operations else None,
        "exit_code": exit_.code if exit_ else None,
        "exit_signal": exit_.signal if exit_ else None,
        "error": process.error,
    }


def _memory(core: Core) -> types.MemoryStatus:
    ram = core.ports.host.ram()
    return {
        "host_ram_total_mb": ram.total_bytes // MIB,
        "host_ram_free_mb": ram.available_bytes // MIB,
        "host_ram_budget_mb": core.limits.ram_budget_bytes // MIB,
        "snapshots_mb": core.snapshots_bytes() // MIB,
        "disk_used_mb": 0,
        "disk_budget_mb": core.limits.disk_budget_bytes // MIB,
    }


def _metrics(core: Core) -> types.Metrics:
    c = core.node.counters
    return {
        "requests": c.requests,
        "cache_hits": c.cache_hits,
        "freezes": c.freezes,
        "thaws": c.thaws,
        "forks": 0,
        "migrations": c.migrations,
        "hibernations": 0,
        "cold_starts": c.cold_starts,
        "avg_freeze_ms": round(c.freeze_ms / c.freezes) if c.freezes else 0,
        "avg_thaw_ms": round(c.thaw_ms / c.thaws) if c.thaws else 0,
    }
