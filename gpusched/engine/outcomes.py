"""What the end of a move means for the record of its process. Pure; ``orders.py`` applies it."""

from __future__ import annotations

from typing import Any, Final

from gpusched import errors
from gpusched.domain.capacity import add
from gpusched.domain.exchange import Order
from gpusched.domain.moves import Move, Outcome
from gpusched.domain.states import Trigger
from gpusched.engine import admission
from gpusched.engine.events import DiskReport, MoveEnded
from gpusched.engine.model import OnDisk, Process

#: Moves between host RAM and disk.
ON_DISK: Final = (Move.HIBERNATE, Move.SAVE, Move.WAKE, Move.RETREAT)


def trigger_of(ended: MoveEnded) -> Trigger:
    if ended.disk is not None and ended.disk.back_on_disk:
        return Trigger.FOUND_HIBERNATED
    if ended.order.move is Move.SAVE and ended.outcome is Outcome.DONE:
        return Trigger.SAVED
    if ended.order.move is Move.DEEPEN and ended.outcome is Outcome.DONE:
        return Trigger.DEEPENED
    return Trigger(ended.outcome)


def changes_after(process: Process, ended: MoveEnded, unix_s: float) -> dict[str, Any]:
    """What the record of a process learns from the end of a move."""
    changes: dict[str, Any] = {}
    order = ended.order
    if ended.oom_scores is not None:
        changes["oom_scores"] = ended.oom_scores
    if ended.moved is not None:
        changes["moved"] = ended.moved
    if ended.kept is not None:
        changes["kept"] = ended.kept
    if ended.late:
        changes["vram"] = add(process.vram, ended.late)
    if ended.outcome is Outcome.LOST:
        changes["error"] = f"{ended.error}. {ended.note}"
    if ended.disk is not None and ended.disk.back_on_disk:
        lost: dict[str, Any] = {"main": None, "oom_scores": {}, "moved": {}, "writing": None}
        changes |= {**lost, "error": str(ended.error)}
    elif order.move in ON_DISK:
        changes |= _disk_changes(process, ended, unix_s)
    if ended.outcome is Outcome.DONE:
        changes["error"] = None
        if order.move is Move.THAW:
            changes |= {
                "gpus": tuple((order.gpu_map or {}).get(g, g) for g in process.gpus),
                "vram": admission.need_of([(process, order.gpu_map)]),
                "last_used_unix_s": unix_s,
                # It runs, so it is not any more what the image holds.
                "on_disk": None,
                "copy_of": None,
            }
    return changes


def _disk_changes(process: Process, ended: MoveEnded, unix_s: float) -> dict[str, Any]:
    """What a move to or from disk changes; on disk, pids are those inside."""
    assert ended.disk is not None
    if ended.outcome is not Outcome.DONE:
        return {"writing": None}
    match ended.order.move:
        case Move.HIBERNATE:
            held = on_disk(process, ended.disk, unix_s)
            return {
                "on_disk": held,
                "writing": None,
                "main": None,
                "oom_scores": {},
                "moved": {},
            }
        case Move.WAKE:
            assert process.on_disk is not None
            return {**process.on_disk.woken(ended.disk.pids), "main": ended.disk.main}
        case Move.RETREAT:
            return {"main": None, "oom_scores": {}, "moved": {}}
        case _:
            return {}


def on_disk(process: Process, report: DiskReport, unix_s: float) -> OnDisk:
    assert report.image is not None
    return OnDisk.of(
        process,
        report.image,
        size_bytes=report.image_bytes,
        created_unix_s=unix_s,
        pids=report.pids,
    )


def refused(op_id: str, order: Order, error: errors.GpuschedError) -> MoveEnded:
    """The end of an order that was never begun."""
    disk = DiskReport() if order.move in ON_DISK else None
    return MoveEnded(
        op_id=op_id,
        order=order,
        outcome=Outcome.ROLLED_BACK,
        duration_ms=0.0,
        disk=disk,
        error=error,
    )
