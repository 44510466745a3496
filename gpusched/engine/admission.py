"""May this operation go ahead? Pure decisions on surveyed facts; a refusal is an error with the numbers in it.

Nothing has been touched when these run, so a refusal leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gpusched import errors
from gpusched.domain.capacity import Promise, Shortage, add, larger, remap, vram_shortages
from gpusched.domain.exchange import GpuMap
from gpusched.domain.states import ProcState
from gpusched.engine.events import Surveyed, TreeFacts
from gpusched.engine.model import Caller, Process
from gpusched.ports import Gpu
from gpusched.units import GIB, format_size

#: Host RAM that a freeze leaves to everybody else: the larger of 1 GiB and 2 % of the machine.
RESERVE_BYTES: Final = GIB
RESERVE_SHARE: Final = 0.02
#: Processes of one ordinary user, those included that have ended and keep their names.
ENTRIES_PER_UID: Final = 1000


def require_owner(caller: Caller | None, process: Process) -> None:
    """Raises PermissionDenied unless the caller may act on ``process``."""
    if caller is None or caller.privileged or caller.uid == process.uid:
        return
    raise errors.PermissionDenied(
        f"{process.name} belongs to uid {process.uid}; you are uid {caller.uid}"
    )


def require_few(caller: Caller, processes: Iterable[Process], more: int = 1) -> None:
    """Raises Unavailable when an ordinary user would have more entries than one may: each costs memory and files."""
    if caller.privileged:
        return
    own = sum(p.uid == caller.uid for p in processes)
    if own + more > ENTRIES_PER_UID:
        raise errors.Unavailable(
            f"uid {caller.uid} has {own} processes already, those that have ended included; "
            "gpusched kill the ones that you no longer need"
        )


def require_healthy_tree(process: Process, facts: TreeFacts) -> None:
    """Raises when the tree of an active process is not what its owner may freeze."""
    if not facts.members:
        raise errors.ProcessExited(f"{process.name} has ended")
    foreign = [m for m in facts.members if process.uid != 0 and m.ruid != process.uid]
    if foreign:
        raise errors.PermissionDenied(
            f"{process.name} has a descendant of another user (pid {foreign[0].pid}, uid {foreign[0].ruid}); "
            "gpusched does not stop other users' processes"
        )
    stopped = [m.pid for m in facts.members if m.stopped]
    if stopped and process.error is None:
        raise errors.IllegalTransition(
            f"{process.name} has stopped processes (pids {stopped}), and the driver needs them running; "
            f"continue them first: kill -CONT {' '.join(map(str, stopped))}",
            {"pids": stopped},
        )


def require_no_obstacle(process: Process, facts: TreeFacts, *, force: bool) -> None:
    """Raises Unsupported for state that would not survive; ``force`` lets uncertain findings through."""
    for obstacle in facts.obstacles:
        if obstacle.certain or not force:
            hint = "" if obstacle.certain else " (if you know better: --force)"
            raise errors.Unsupported(
                f"{process.name} cannot be frozen: {obstacle.message}{hint}",
                {"pid": obstacle.pid, "kind": obstacle.kind, "certain": obstacle.certain},
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRamShortage:
    """Host RAM that does not suffice; ``missing_bytes`` is what cold trees would have to give up."""

    missing_bytes: int
    message: str
    advice: str
    numbers: Mapping[str, int]

    def error(self, unmovable: Sequence[str] = ()) -> errors.InsufficientHostMemory:
        """The refusal; ``unmovable`` says who cannot go to disk, and why."""
        stuck = f" Cannot go to disk: {'; '.join(unmovable)}." if unmovable else ""
        return errors.InsufficientHostMemory(f"{self.message} {self.advice}{stuck}", self.numbers)


def host_ram_shortage(
    off: Sequence[Process],
    up: Sequence[Process],
    facts: Surveyed,
    *,
    promised_bytes: int,
    snapshots_bytes: int,
    leaving_bytes: int,
    budget_bytes: int,
) -> HostRamShortage | None:
    """What is missing for the VRAM of ``off`` and the images of ``up``, once ``leaving_bytes`` have gone to disk.

    Raises InsufficientHostMemory where a limit is in the way that nobody's going helps with.
    """
    assert facts.ram is not None
    need = sum(sum(held_now(p, facts).values()) for p in off) + sum(on_disk_bytes(p) for p in up)
    if not need:
        return None
    names = ", ".join(p.name for p in (*off, *up))
    reserve = max(RESERVE_BYTES, int(facts.ram.total_bytes * RESERVE_SHARE))
    numbers = {
        "need_bytes": need,
        "available_bytes": facts.ram.available_bytes,
        "promised_bytes": promised_bytes,
        "reserve_bytes": reserve,
        "budget_bytes": budget_bytes,
        "snapshots_bytes": snapshots_bytes,
    }
    _require_cgroup_room(off, facts, numbers)
    room = facts.ram.available_bytes + leaving_bytes - promised_bytes - reserve
    if need > room:
        return HostRamShortage(
            missing_bytes=need - room,
            message=f"{names} needs {format_size(need)} of host RAM; {format_size(facts.ram.available_bytes)} is "
            f"available, of which {format_size(reserve)} stays free and {format_size(promised_bytes)} is "
            "promised to running operations.",
            advice="Kill or thaw something frozen first.",
            numbers=numbers,
        )
    frozen = sum(sum(held_now(p, facts).values()) for p in off) + sum(p.vram_bytes for p in up)
    taken = snapshots_bytes - leaving_bytes + promised_bytes
    if taken + frozen > budget_bytes:
        return HostRamShortage(
            missing_bytes=taken + frozen - budget_bytes,
            message=f"{names} needs {format_size(frozen)}; {format_size(snapshots_bytes + promised_bytes)} of the RAM "
            f"budget of {format_size(budget_bytes)} is taken.",
            advice="Thaw or kill something frozen, or start the daemon with a larger --ram-budget.",
            numbers=numbers,
        )
    return None


def require_quota(
    off: Sequence[Process],
    in_ram: Sequence[Process],
    facts: Surveyed,
    quota_bytes: int,
) -> None:
    """Raises InsufficientHostMemory when freezing ``off`` exceeds what an ordinary user's may take of host RAM.

    ``in_ram``: whose contents are there already, or on their way.
    """
    for uid in {p.uid for p in off} - {0}:
        need = sum(sum(held_now(p, facts).values()) for p in off if p.uid == uid)
        taken = sum(p.vram_bytes for p in in_ram if p.uid == uid)
        advice = "Thaw, hibernate or kill something frozen." if taken else "It alone exceeds that."
        if need and need + taken > quota_bytes:
            raise errors.InsufficientHostMemory(
                f"this needs {format_size(need)} of host RAM; uid {uid} has {format_size(taken)} of its "
                f"{format_size(quota_bytes)} (user_ram_budget). {advice}",
                {
                    "need_bytes": need,
                    "snapshots_bytes": taken,
                    "budget_bytes": quota_bytes,
                    "uid": uid,
                },
            )


def _require_cgroup_room(
    off: Sequence[Process], facts: Surveyed, numbers: Mapping[str, int]
) -> None:
    for process in off:
        limit = facts.trees[process.tree_id].cgroup_room_bytes
        own = sum(held_now(process, facts).values())
        if limit is not None and own > limit:
            raise errors.InsufficientHostMemory(
                f"{process.name} needs {format_size(own)} of host RAM, and its cgroup's memory limit leaves "
                f"{format_size(max(0, limit))}; raise the limit (memory.max) first.",
                {**numbers, "cgroup_room_bytes": limit},
            )


def on_disk_bytes(process: Process) -> int:
    """What an image takes, and so about what its processes take in RAM when they come back."""
    return process.on_disk.size_bytes if process.on_disk is not None else 0


def held_now(process: Process, facts: Surveyed) -> dict[str, int]:
    """VRAM that ``process`` holds by GPU, as sampled."""
    return facts.held.get(process.tree_id, {})


def need_of(on: Iterable[tuple[Process, GpuMap]]) -> dict[str, int]:
    """VRAM that thawing ``on`` takes, by GPU."""
    return add(*(remap(process.vram, gpu_map) for process, gpu_map in on))


def shortages(
    off: Sequence[Process],
    on: Sequence[tuple[Process, GpuMap]],
    facts: Surveyed,
    promises: Iterable[Promise],
    stays: Mapping[str, int] = MappingProxyType({}),
) -> list[Shortage]:
    """The GPUs on which ``on`` would not fit once ``off`` has left; of that ``stays`` bytes remain taken."""
    assert facts.usage is not None
    free = {
        uuid: memory.free_bytes - stays.get(uuid, 0) for uuid, memory in facts.usage.gpus.items()
    }
    return vram_shortages(
        need=need_of(on),
        # What goes off gives its room, and what could not be taken back may have some of its own already.
        free=add(free, *(held_now(p, facts) for p in (*off, *(p for p, _ in on)))),
        promises=promises,
        held=facts.held,
    )


def promise_for(
    off: Sequence[Process],
    on: Sequence[tuple[Process, GpuMap]],
    facts: Surveyed,
    disk_bytes: int = 0,
    stays: Mapping[str, int] = MappingProxyType({}),
) -> Promise:
    """Room for the way forward, beside which ``stays`` remains of ``off``, and for the way back."""
    back = add(*(held_now(p, facts) for p in off))
    waking = sum(on_disk_bytes(p) for p, _ in on if p.main is None)
    return Promise(
        tree_ids=frozenset({p.tree_id for p in off} | {p.tree_id for p, _ in on}),
        vram=larger(add(need_of(on), stays), back),
        host_bytes=sum(back.values()) + waking,
        disk_bytes=disk_bytes,
    )


def occupants(processes: Iterable[Process], facts: Surveyed) -> dict[str, list[str]]:
    """The names of those of ``processes`` that are on each GPU; a context that a frozen one has left does not count."""
    found: dict[str, list[str]] = {}
    for process in processes:
        if process.state is not ProcState.FROZEN:
            for uuid in held_now(process, facts):
                found.setdefault(uuid, []).append(process.name)
    return found


def too_little_vram(
    names: Sequence[str],
    found: Sequence[Shortage],
    gpus: Mapping[str, Gpu],
    there: Mapping[str, Sequence[str]],
    *,
    evict: bool,
) -> errors.InsufficientGpuMemory:
    """The refusal, with who is there and what to do. ``there``: see ``occupants``."""
    worst = max(found, key=lambda s: s.missing)
    gpu = gpus.get(worst.gpu)
    where = f"GPU {gpu.index}" if gpu else worst.gpu
    names_there = ", ".join(there.get(worst.gpu, ())) or "no managed process"
    promised = (
        f", {format_size(worst.promised)} of it promised to running operations"
        if worst.promised
        else ""
    )
    wanted = ", ".join(names)
    advice = (
        "None of them may be evicted (leased, busy, or another user's)."
        if evict
        else f"Make room first: gpusched swap OTHER {wanted}, or gpusched thaw --evict {wanted}."
    )
    return errors.InsufficientGpuMemory(
        f"{wanted} needs {format_size(worst.need)} on {where}; {format_size(worst.free)} would be free"
        f"{promised}. Active there: {names_there}. {advice}",
        {
            "gpus": [
                {
                    "uuid": s.gpu,
                    "need_bytes": s.need,
                    "free_bytes": s.free,
                    "promised_bytes": s.promised,
                    "missing_bytes": s.missing,
                }
                for s in found
            ]
        },
    )
