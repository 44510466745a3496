"""Making room in host RAM before anybody needs it: one frozen process after the other goes to disk in the background.

Only where the daemon was told to keep a reserve, and only while nothing else is under way. It is a hibernation like any
other, but for one thing: as soon as a request wants the process, it is given up, and the process is frozen as before.
Who needs room while it is at work waits for its end rather than sending somebody else (``Exchanges``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from gpusched import errors
from gpusched.domain.eviction import Cold, DiskPolicy, ahead_of_need
from gpusched.engine.core import Core
from gpusched.engine.model import Operation
from gpusched.protocol import messages as m

log = logging.getLogger(__name__)


class AheadOfNeed:
    """At most one operation of the engine's own."""

    def __init__(
        self, core: Core, policy: DiskPolicy, cold: Callable[[Collection[str]], list[Cold]]
    ) -> None:
        """``cold``: the frozen processes that may go, without the given ones."""
        self._core = core
        self._policy = policy
        self._cold = cold
        self._op: Operation | None = None
        #: Those that could not go, with when they had been used last: until they are used again they cannot either.
        self._stuck: dict[str, float] = {}

    @property
    def is_at_work(self) -> bool:
        return self._op is not None and self._op.op_id in self._core.node.operations

    def next(self) -> Operation | None:
        """An operation to begin, when there is something to do and nobody else does anything."""
        reserve = self._core.limits.ram_reserve_bytes
        if not reserve or self._core.node.operations:
            return None
        self._note_failure()
        processes = self._core.node.processes
        stuck = [
            t
            for t, used in self._stuck.items()
            if t in processes and processes[t].last_used_unix_s == used
        ]
        tree_id = ahead_of_need(
            self._policy,
            self._cold(stuck),
            used_bytes=self._core.snapshots_bytes(),
            budget_bytes=self._core.ram_budget_bytes(),
            reserve_bytes=reserve,
        )
        if tree_id is None:
            return None
        self._op = Operation(
            op_id=self._core.new_op_id(),
            kind="hibernate",
            caller=None,
            params=m.Hibernate(name=processes[tree_id].name),
            tree_ids=(tree_id,),
            future=asyncio.get_running_loop().create_future(),
            arrived_s=self._core.monotonic_s,
        )
        log.info("to disk ahead of need process=%s op=%s", self._op.params.name, self._op.op_id)
        return self._op

    def _note_failure(self) -> None:
        if self._op is None or not self._op.future.done():
            return
        tree_id, error = self._op.tree_ids[0], self._op.future.exception()
        process = self._core.node.processes.get(tree_id)
        if error is not None and process is not None and not isinstance(error, errors.Cancelled):
            log.warning("not to disk ahead of need process=%s: %s", process.name, error)
            self._stuck[tree_id] = process.last_used_unix_s
        self._op = None

    def give_way(self, wanted: Iterable[str]) -> None:
        """Somebody wants these trees now."""
        if self._op is None or not self.is_at_work:
            return
        for tree_id in set(wanted) & set(self._op.tree_ids):
            process = self._core.node.processes.get(tree_id)
            if process is not None and process.writing is not None:
                self._core.ports.disk.give_up(process.writing)
