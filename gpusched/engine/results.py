"""What a client is told when an exchange has ended: the wire's results, and failures that say where things are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpusched import errors
from gpusched.domain.moves import Outcome
from gpusched.domain.states import ProcState, tier_of
from gpusched.engine.admission import on_disk_bytes
from gpusched.engine.core import Core
from gpusched.engine.model import Operation, Process
from gpusched.protocol import messages as m
from gpusched.units import mib

_S = ProcState


class Results:
    """Reads the node and an operation; changes nothing."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def failure(self, op: Operation) -> errors.GpuschedError:
        """What the client is told: the cause, and where its processes are now."""
        cause = op.error
        if not isinstance(cause, errors.GpuschedError):
            cause = errors.InternalError(f"{op.kind} failed: {cause!r}")
        processes = [self._core.node.processes[t] for t in op.tree_ids]
        now = ", ".join(f"{p.name} is {p.state}" for p in processes)
        verb = {"acquire": "thaw"}.get(op.kind, op.kind)
        if op.exchange is not None and op.exchange.outcome is Outcome.LOST:
            lost = [p.name for p in processes if p.state is _S.FAILED]
            advice = f"Try again, or: gpusched kill {lost[0]}." if lost else ""
            new: errors.GpuschedError = errors.ProcessLost(
                f"{verb} failed and could not be taken back: {cause} Now {now}. {advice}",
                {**cause.details, "cause_code": cause.code},
            )
        else:
            text = f"{verb} failed and was rolled back (now {now}): {cause}"
            new = type(cause)(text, cause.details)
        new.__cause__ = cause
        return new

    def elapsed_ms(self, op: Operation) -> int:
        return round((self._core.monotonic_s - op.begun_s) * 1000)

    def of(self, op: Operation) -> dict[str, Any]:
        assert op.exchange is not None
        by_name = {p.name: p for p in (self._core.node.processes[t] for t in op.tree_ids)}
        match op.params:
            case m.Freeze() | m.Hibernate():
                return self._frozen(op, by_name[op.params.name])
            case m.Thaw() | m.Acquire():
                return self._thawed(op, by_name[op.params.name])
            case m.Swap():
                return {
                    "duration_ms": self.elapsed_ms(op),
                    "off": [self._frozen(op, by_name[n]) for n in names(op.params.off)],
                    "on": [self._thawed(op, by_name[n]) for n in names(op.params.on)],
                }
            case _:
                return self._migrated(op, self._core.node.processes[op.tree_ids[0]])

    def _moved(self, op: Operation, process: Process) -> dict[str, Any]:
        moved = process.tree_id in op.durations_ms
        single = len(op.tree_ids) == 1 or (len(op.exchange.trees) == 1 if op.exchange else False)
        took = self.elapsed_ms(op) if single else round(op.durations_ms.get(process.tree_id, 0))
        result: dict[str, Any] = {
            "name": process.name,
            "duration_ms": took if moved else 0,
            "mem_mb": mib(process.vram_bytes),
        }
        if moved:
            result["phases_ms"] = op.phases_ms[process.tree_id]
            has_moved = op.exchange is None or process.tree_id not in op.exchange.deepen
            if process.vram_bytes and has_moved and not self._core.description.simulated:
                result["path"] = _path(op.phases_ms[process.tree_id])
            result["driver_ms"] = round(op.driver_ms[process.tree_id], 2)
        if self._core.description.simulated:
            result["simulated"] = True
        return result

    def _frozen(self, op: Operation, process: Process) -> dict[str, Any]:
        result = self._moved(op, process) | {"tier": tier_of(process.state).value}
        if getattr(op.params, "keep_context", False):
            result["context_mb"] = mib(op.kept_bytes.get(process.tree_id, 0))
        if process.state is _S.HIBERNATED:
            result["disk_mb"] = mib(on_disk_bytes(process))
        if op.exchange is not None and op.exchange.room:
            result["to_disk"] = [self._core.node.processes[t].name for t in op.exchange.room]
        return result

    def _thawed(self, op: Operation, process: Process) -> dict[str, Any]:
        before = op.before.get(process.tree_id, process.state)
        result = self._moved(op, process) | {"from_tier": tier_of(before).value}
        if op.exchange is not None and op.exchange.room:
            result["to_disk"] = [self._core.node.processes[t].name for t in op.exchange.room]
        if op.evicted:
            result["evicted"] = [self._core.node.processes[t].name for t in op.evicted]
        return result

    def _migrated(self, op: Operation, process: Process) -> dict[str, Any]:
        assert op.exchange is not None
        gpu_map = op.exchange.on.get(process.tree_id) or {}
        back = {target: source for source, target in gpu_map.items()}
        index = {uuid: gpu.index for uuid, gpu in self._core.gpus.items()}
        return self._moved(op, process) | {
            "duration_ms": self.elapsed_ms(op) if op.durations_ms else 0,
            "from_gpu": index.get(back.get(process.gpus[0], process.gpus[0]), -1),
            "to_gpu": index.get(process.gpus[0], -1),
        }


def _path(phases_ms: Mapping[str, float]) -> str:
    """Whether the contents went past the driver's own copy: those are the phases of that."""
    return "direct" if {"export", "create"} & phases_ms.keys() else "driver"


def names(value: str | list[str]) -> list[str]:
    """The names in a parameter that takes one or several."""
    return [value] if isinstance(value, str) else list(value)
