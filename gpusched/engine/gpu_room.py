"""Room on GPUs for what is to come on: who keeps nothing there, who is evicted, and who must wait for that.

In this order: contexts that the operation itself would leave, contexts that are there, active processes (only where the
request says so). Covers one operation's look at it; the facts are surveyed before. See also ``kept.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gpusched.domain.capacity import Promise, Shortage
from gpusched.domain.eviction import Candidate, choose_victims
from gpusched.domain.exchange import GpuMap
from gpusched.domain.states import ProcState
from gpusched.engine import admission, kept
from gpusched.engine.ahead import deepen
from gpusched.engine.core import Core
from gpusched.engine.events import Surveyed
from gpusched.engine.model import Operation, Process


class GpuRoom:
    """Of one node. Operations that it lets wait have no promise and hold nothing but their own trees."""

    def __init__(self, core: Core, survey: Callable[[Operation], None]) -> None:
        self._core = core
        self._survey = survey
        #: Operations that need room on a GPU -> those that take contexts off there for them.
        self._awaiting: dict[str, set[str]] = {}

    def shortage(
        self,
        op: Operation,
        off: Sequence[Process],
        on: Sequence[tuple[Process, GpuMap]],
        facts: Surveyed,
        promises: Sequence[Promise],
    ) -> list[Shortage]:
        """What is missing on which GPU once ``off`` has left; contexts stay only where that leaves enough."""
        assert op.exchange is not None
        leaving = [*off, *(self._core.node.processes[t] for t in op.exchange.deepen)]
        stays = self.stays(op, off, facts)
        found = admission.shortages(leaving, on, facts, promises, stays)
        if found and op.keep_context:
            op.keep_context = False
            found = admission.shortages(leaving, on, facts, promises)
        return found

    def stays(self, op: Operation, off: Sequence[Process], facts: Surveyed) -> dict[str, int]:
        each = self._core.description.context_bytes
        return kept.stays(off, facts, each) if op.keep_context else {}

    def make(
        self,
        op: Operation,
        off: Sequence[Process],
        on: Sequence[tuple[Process, GpuMap]],
        short: Sequence[Shortage],
        facts: Surveyed,
    ) -> None:
        """Has contexts go, or adds victims to the operation, and surveys again. Raises InsufficientGpuMemory.

        That is, when evicting was not asked for or is not enough.
        """
        missing = {s.gpu: s.missing for s in short}
        evict = getattr(op.params, "evict", False)
        may_evict = evict and not op.evicted
        active = self._candidates(op, facts) if may_evict else []
        if contexts := self._contexts(op, missing, active, facts):
            op.asked_to_go |= set(contexts)
            self._awaiting[op.op_id] = {deepen(self._core, tree_id) for tree_id in contexts}
            return
        victims = choose_victims(active, missing) if may_evict else None
        if not victims:
            others = [p for p in self._core.node.processes.values() if p not in off]
            raise admission.too_little_vram(
                [p.name for p, _ in on],
                short,
                self._core.gpus,
                admission.occupants(others, facts),
                evict=evict,
            )
        assert op.exchange is not None
        op.evicted = victims
        op.tree_ids = (*op.tree_ids, *victims)
        self._core.claim(op, victims)
        op.exchange = replace(op.exchange, off=(*op.exchange.off, *victims))
        self._survey(op)

    def resume(self) -> None:
        """What waited for contexts to go looks again, whether they have gone or not."""
        operations = self._core.node.operations
        for op_id, others in list(self._awaiting.items()):
            if not others & operations.keys():
                del self._awaiting[op_id]
                if op_id in operations:
                    self._survey(operations[op_id])

    def _contexts(
        self,
        op: Operation,
        missing: Mapping[str, int],
        active: Sequence[Candidate],
        facts: Surveyed,
    ) -> tuple[str, ...]:
        """Frozen trees whose contexts are to go: the fewest that do; all, where those and evicting ``active`` do.

        None that this operation has asked before, and none for nothing.
        """
        node = self._core.node
        idle = [
            p for t, p in node.processes.items() if t not in node.busy and t not in op.asked_to_go
        ]
        there = [c for c in kept.candidates(idle, facts) if c.vram.keys() & missing.keys()]
        if (fewest := choose_victims(there, missing)) is not None:
            return fewest
        if choose_victims([*there, *active], missing) is not None:
            return tuple(c.tree_id for c in there)
        return ()

    def _candidates(self, op: Operation, facts: Surveyed) -> list[Candidate]:
        node = self._core.node
        return [
            Candidate(tree_id=t, last_used_unix_s=p.last_used_unix_s, vram=facts.held.get(t, {}))
            for t, p in node.processes.items()
            if p.state is ProcState.ACTIVE
            and t not in node.busy
            and node.lease_count(t, self._core.unix_s) == 0
            and (p.evictable or (op.caller is not None and p.uid == op.caller.uid))
        ]
