"""CUDA contexts that freezes have left on GPUs: whose have to go before an exchange, and what may stay. Pure decisions.

A process that was frozen with ``keep_context`` holds a few hundred megabytes of each of its GPUs and comes back without
having its context made anew. It gives that up (``Move.DEEPEN``) as soon as anybody needs the room, when it is to be
saved to disk, and when its owner asks for a freeze that leaves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gpusched.domain.capacity import add
from gpusched.domain.eviction import Candidate
from gpusched.domain.states import ProcState
from gpusched.engine.events import Surveyed
from gpusched.engine.model import Operation, Process
from gpusched.engine.results import names
from gpusched.protocol import messages as m


def of(process: Process, facts: Surveyed) -> dict[str, int]:
    """VRAM that a frozen process still has, in bytes for each GPU; empty for all others."""
    held = facts.held.get(process.tree_id, {}) if process.state is ProcState.FROZEN else {}
    return {uuid: size for uuid, size in held.items() if size > 0}


def must_go(op: Operation, processes: Mapping[str, Process], facts: Surveyed) -> tuple[str, ...]:
    """The frozen trees of ``op`` whose contexts cannot stay: those that go to disk, or are to leave nothing."""
    assert op.exchange is not None
    wanted = [*op.exchange.room, *op.exchange.down]
    if not op.keep_context:
        off = op.params.off if isinstance(op.params, m.Swap) else getattr(op.params, "name", [])
        leaves = names(off) if isinstance(op.params, m.Freeze | m.Swap) else []
        wanted += [t for t in op.tree_ids if processes[t].name in leaves]
    return tuple(t for t in dict.fromkeys(wanted) if of(processes[t], facts))


def stays(off: Iterable[Process], facts: Surveyed, context_bytes: int) -> dict[str, int]:
    """VRAM that freezing ``off`` leaves taken, in bytes for each GPU, when each process keeps ``context_bytes``."""
    return add(
        *(
            {
                uuid: min(size, context_bytes * len(facts.trees[p.tree_id].members))
                for uuid, size in facts.held.get(p.tree_id, {}).items()
            }
            for p in off
        )
    )


def candidates(processes: Iterable[Process], facts: Surveyed) -> list[Candidate]:
    """Those of ``processes`` that are frozen and have contexts on GPUs, which can go."""
    return [
        Candidate(tree_id=p.tree_id, last_used_unix_s=p.last_used_unix_s, vram=held)
        for p in processes
        if (held := of(p, facts))
    ]
