"""May this tree go to disk, or come back from there? Pure decisions on surveyed facts; see also ``admission.py``."""

from __future__ import annotations

from collections.abc import Sequence

from gpusched import errors
from gpusched.engine.admission import held_now
from gpusched.engine.events import Surveyed
from gpusched.engine.model import Process
from gpusched.ports import DiskRoom
from gpusched.units import format_size


def require_possible(kind: str, process: Process, why_not: str) -> None:
    """Raises Unsupported when this machine, or this tree, cannot be saved at all."""
    if why_not:
        raise errors.Unsupported(f"{kind} is not possible here: {why_not}")
    if not process.isolated:
        how = "was adopted" if process.adopted else "was started without namespaces of its own"
        raise errors.Unsupported(
            f"{process.name} {how}, and only a process in its own can be saved to disk and come back with its pids; "
            "start it with gpusched run, without --no-isolate"
        )


def require_no_obstacle(process: Process, facts: Surveyed, *, force: bool) -> None:
    """Raises Unsupported for what cannot be saved; ``force`` lets through what is only uncertain."""
    for obstacle in facts.disk[process.tree_id].obstacles:
        if obstacle.certain or not force:
            hint = "" if obstacle.certain else " (if you know better: --force)"
            raise errors.Unsupported(
                f"{process.name} cannot be saved to disk: {obstacle.message}{hint}",
                {"pid": obstacle.pid, "kind": obstacle.kind, "certain": obstacle.certain},
            )


def require_unshared(process: Process, facts: Surveyed, *, force: bool) -> None:
    """Raises Unsupported when copies would write to files of the original; ``force`` lets them."""
    files = facts.disk[process.tree_id].shared_files
    if files and not force:
        listed = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        raise errors.Unsupported(
            f"{process.name} has files open for writing, and its copies would write to the same: {listed}; "
            "if they get along with that: --force",
            {"files": list(files)},
        )


def need_of(saved: Sequence[Process], facts: Surveyed) -> int:
    """Bytes that the images of ``saved`` will take at most; VRAM that is on a GPU still comes on top."""
    return sum(facts.disk[p.tree_id].need_bytes + sum(held_now(p, facts).values()) for p in saved)


def require_disk(
    saved: Sequence[Process],
    facts: Surveyed,
    room: DiskRoom,
    *,
    promised_bytes: int,
    budget_bytes: int,
) -> None:
    """Raises InsufficientDisk when the images of ``saved`` fit into neither the budget nor the file system."""
    need = need_of(saved, facts)
    if not saved:
        return
    names = ", ".join(p.name for p in saved)
    numbers = {
        "need_bytes": need,
        "used_bytes": room.used_bytes,
        "free_bytes": room.free_bytes,
        "promised_bytes": promised_bytes,
        "budget_bytes": budget_bytes,
    }
    if room.used_bytes + promised_bytes + need > budget_bytes:
        raise errors.InsufficientDisk(
            f"{names} needs {format_size(need)} on disk; {format_size(room.used_bytes + promised_bytes)} of the disk "
            f"budget of {format_size(budget_bytes)} is taken. Thaw or kill something hibernated, or start the daemon "
            "with a larger --disk-budget.",
            numbers,
        )
    if promised_bytes + need > room.free_bytes:
        raise errors.InsufficientDisk(
            f"{names} needs {format_size(need)} on disk; {format_size(room.free_bytes)} is free, of which "
            f"{format_size(promised_bytes)} is promised to running operations. Free some, or start the daemon with "
            "another --disk-dir.",
            numbers,
        )


def require_unchanged(process: Process, changes: Sequence[str]) -> None:
    """Raises Unsupported when the image of ``process`` does not fit this machine as it is now."""
    if changes:
        raise errors.Unsupported(
            f"{process.name} cannot come back from disk as things are: {'; '.join(changes)}. Its image is kept: put "
            f"that right and try again, or give it up with gpusched kill {process.name}.",
            {"changes": list(changes)},
        )
