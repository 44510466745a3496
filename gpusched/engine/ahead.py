"""Making room before anybody needs it, in the background.

In host RAM: one frozen process after the other goes to disk. Only where the daemon was told to keep a reserve, and only
while nothing else is under way. It is a hibernation like any other, but for one thing: as soon as a request wants the
process, it is given up, and the process is frozen as before. Who needs room while it is at work waits for its end and
sends nobody else (``Exchanges``).

On a GPU: contexts that freezes have left there go when a process is started there, which takes room without asking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from gpusched import errors
from gpusched.domain.eviction import Cold, DiskPolicy, ahead_of_need
from gpusched.domain.states import ProcState
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
        params = m.Hibernate(name=processes[tree_id].name)
        self._op = _of_our_own(self._core, "hibernate", params, tree_id)
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


def clear_contexts(core: Core, gpus: Collection[str]) -> None:
    """Has frozen processes leave nothing on ``gpus`` (UUIDs), as far as is known. Returns at once."""
    for tree_id, process in list(core.node.processes.items()):
        if process.state is ProcState.FROZEN and process.kept.keys() & set(gpus):
            deepen(core, tree_id)


def deepen(core: Core, tree_id: str) -> str:
    """Has one frozen process leave nothing on its GPUs; the operation's id.

    It is a freeze that nobody asked for: when its turn comes and the process runs, nothing is done. One that fails
    leaves the process frozen as it was, which is logged.
    """
    for waiting in core.node.operations.values():
        if waiting.caller is None and waiting.kind == "freeze" and waiting.tree_ids == (tree_id,):
            return waiting.op_id
    op = _of_our_own(core, "freeze", m.Freeze(name=core.node.processes[tree_id].name), tree_id)
    op.future.add_done_callback(_log_failure)
    core.node.operations[op.op_id] = op
    return op.op_id


def _of_our_own(core: Core, kind: str, params: m.Freeze | m.Hibernate, tree_id: str) -> Operation:
    return Operation(
        op_id=core.new_op_id(),
        kind=kind,
        caller=None,
        params=params,
        tree_ids=(tree_id,),
        future=asyncio.get_running_loop().create_future(),
        arrived_s=core.monotonic_s,
    )


def _log_failure(future: asyncio.Future[object]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.warning("a context stays on its GPU: %s", error)
