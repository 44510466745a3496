"""Fork: running copies of a process from one image of it, the original going on as it was.

Two exchanges in a row: the source freezes, is saved and thaws again; then the copies, which begin as processes on
disk with that image, wake and thaw like any other. The second is whole or nothing: after a failure no copy is kept.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from gpusched import errors
from gpusched.domain.exchange import Exchange, GpuMap
from gpusched.domain.moves import Outcome
from gpusched.domain.placement import permutation
from gpusched.domain.states import ProcState
from gpusched.engine.admission import require_few
from gpusched.engine.core import Core
from gpusched.engine.events import Abandoned
from gpusched.engine.exchanges import Exchanges
from gpusched.engine.model import Operation, Process
from gpusched.engine.orders import Orders
from gpusched.protocol import messages as m

_S = ProcState
#: What every caller is told of the copies.
NOTE: Final = (
    "each copy is alone in a network namespace, without TCP or UDP to the outside: its listeners, and the "
    "sockets of the CUDA driver, have the addresses of the original's"
)


class Forks:
    """Handles the operation ``fork``; its two exchanges are carried out like all others."""

    def __init__(self, core: Core, exchanges: Exchanges, orders: Orders) -> None:
        self._core = core
        self._exchanges = exchanges
        self._orders = orders
        orders.then["fork"] = self._exchanged

    def start(self, op: Operation) -> None:
        """Begins with the source. Raises refusals that need no survey."""
        source = self._core.node.processes[op.tree_ids[0]]
        if source.state is _S.HIBERNATED:
            raise errors.IllegalTransition(
                f"{source.name} is on disk; thaw it first, or freeze it to keep it off the GPU: "
                f"gpusched thaw {source.name}"
            )
        assert op.caller is not None
        require_few(op.caller, self._core.node.processes.values(), more=op.params.copies)
        op.planned = tuple(zip(self._copies_of(source, op), self._maps(source, op), strict=True))
        self._exchanges.start(op)

    def _copies_of(self, source: Process, op: Operation) -> list[Process]:
        """Processes on disk that are not there yet; NAME-1, NAME-2 and so on, without those that are taken."""
        params: m.Fork = op.params
        taken = {p.name for p in self._core.node.processes.values()}
        free = (n for i in itertools.count(1) if (n := f"{source.name}-{i}") not in taken)
        names = list(itertools.islice(free, params.copies))
        if len(names[-1]) > m.MAX_NAME:
            raise errors.InvalidRequest(
                f"{names[-1]!r} has more than {m.MAX_NAME} characters; a copy is named after its source"
            )
        now = self._core.unix_s
        log_dir = self._core.limits.log_dir
        return [
            Process(
                tree_id=uuid.uuid4().hex[:16],
                name=name,
                uid=source.uid,
                user=source.user,
                gpus=source.gpus,
                started_unix_s=now,
                last_used_unix_s=now,
                state=_S.HIBERNATED,
                isolated=True,
                own_network=True,
                evictable=source.evictable,
                log_path=str(log_dir / f"{name}.log") if source.log_path else None,
                copy_of=source.tree_id,
            )
            for name in names
        ]

    def _maps(self, source: Process, op: Operation) -> list[GpuMap]:
        """Where each copy goes: the GPUs asked for, by turns."""
        params: m.Fork = op.params
        if params.gpus is None:
            return [None] * params.copies
        asked = self._core.uuids(params.gpus)
        if len(source.gpus) == 1:
            targets: list[Sequence[str]] = [(asked[i % len(asked)],) for i in range(params.copies)]
        elif len(asked) == len(source.gpus):
            targets = [asked] * params.copies
        else:
            raise errors.InvalidRequest(
                f"{source.name} uses {len(source.gpus)} GPUs; name as many, for all copies"
            )
        try:
            maps = [permutation(list(self._core.gpus), source.gpus, t) for t in targets]
        except ValueError as error:
            raise errors.InvalidRequest(f"cannot fork {source.name}: {error}") from None
        found: list[GpuMap] = [
            None if tuple(t) == source.gpus else gpu_map
            for t, gpu_map in zip(targets, maps, strict=True)
        ]
        if any(found) and not self._core.description.can_migrate:
            raise errors.Unsupported(
                f"this driver ({self._core.description.driver_version}) cannot put a copy on another GPU; 580 can"
            )
        return found

    def _exchanged(self, op: Operation) -> None:
        """One of the two exchanges has ended."""
        done = op.exchange is not None and op.exchange.outcome is Outcome.DONE
        if not op.copies:
            if done:
                self._make_copies(op)
            else:
                self._core.finish(op, error=self._orders.failure(op))
        elif done:
            self._finish(op)
        else:
            self._core.spawn(self._abandon(op), f"abandon-{op.op_id}", op.op_id)

    def _make_copies(self, op: Operation) -> None:
        """The copies, as processes on disk; everything further is a thaw of them."""
        source = self._core.node.processes[op.tree_ids[0]]
        assert op.saved is not None
        maps: dict[str, GpuMap] = {}
        for planned, gpu_map in op.planned:
            copy = self._core.put(replace(planned, on_disk=op.saved, vram=source.vram))
            maps[copy.tree_id] = gpu_map
        op.planned = ()
        op.copies = tuple(maps)
        op.tree_ids = (source.tree_id, *op.copies)
        self._core.claim(op, op.copies)
        held = source.state is _S.FROZEN and op.before.get(source.tree_id) is _S.ACTIVE
        owed = (source.tree_id,) if held else ()
        op.exchange = Exchange(up=op.copies, on={**dict.fromkeys(owed), **maps}, owed=owed)
        self._exchanges.survey(op)

    def refused(self, op: Operation, error: errors.GpuschedError) -> bool:
        """After a refusal of the second exchange: whether the operation ends here, with its copies."""
        if not op.copies:
            return False
        op.error = error
        assert op.exchange is not None
        self._orders.give_up(op)
        return True

    def _finish(self, op: Operation) -> None:
        source = self._core.node.processes[op.tree_ids[0]]
        copies = [self._core.node.processes[t] for t in op.copies]
        self._core.node.counters.forks += 1
        names = [c.name for c in copies]
        took = round((self._core.monotonic_s - op.begun_s) * 1000)
        self._core.events.emit("fork", source.name, ", ".join(names), duration_ms=took)
        result = {"source": source.name, "copies": names, "note": NOTE, "duration_ms": took}
        if self._core.description.simulated:
            result["simulated"] = True
        self._core.finish(op, result=result)

    async def _abandon(self, op: Operation) -> None:
        """Ends the copies that have come as far as that."""
        left: list[str] = []
        for tree_id in op.copies:
            process = self._core.node.processes[tree_id]
            try:
                await self._core.ports.trees.end(tree_id, process.main)
                await self._core.ports.trees.forget(tree_id)
            except errors.GpuschedError:
                left.append(tree_id)
        self._core.post(Abandoned(op_id=op.op_id, left=tuple(left)))

    def abandoned(self, op: Operation, event: Abandoned) -> None:
        """The copies of a failed fork are gone, but for those that the kernel still holds."""
        cause = op.error
        if not isinstance(cause, errors.GpuschedError):
            cause = errors.InternalError(f"fork failed: {cause!r}")
        source = self._core.node.processes[op.tree_ids[0]]
        kept = [self._core.node.processes[t].name for t in event.left]
        for tree_id in op.copies:
            if tree_id not in event.left:
                self._core.remove(tree_id)
        self._core.sampler.invalidate()
        now = f"copies that could not be ended: {', '.join(kept)}" if kept else "no copy is left"
        error = type(cause)(
            f"fork failed ({now}; {source.name} is {source.state}): {cause}",
            {**cause.details, "copies": kept},
        )
        error.__cause__ = cause
        self._core.finish(op, error=error)
