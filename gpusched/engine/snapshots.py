"""The images on disk, for the people whose processes they hold: what is there, is it whole, away with it."""

from __future__ import annotations

from typing import Any

from gpusched import errors, types
from gpusched.domain.states import ProcState
from gpusched.engine.core import Core, rfc3339
from gpusched.engine.events import Checked
from gpusched.engine.model import Caller, OnDisk, Operation, Process
from gpusched.protocol import messages as m
from gpusched.units import format_age, mib

_S = ProcState


class Snapshots:
    """Lists images, and handles ``verify_snapshot`` and ``delete_snapshot``, each of one process."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def listed(self, caller: Caller) -> types.SnapshotsResult:
        """The images of the caller's processes."""
        now = self._core.unix_s
        found: list[types.SnapshotStatus] = [
            {
                "name": p.name,
                "image": p.on_disk.image,
                "size_mb": mib(p.on_disk.size_bytes),
                "mem_mb": mib(p.vram_bytes),
                "created": rfc3339(p.on_disk.created_unix_s),
                "age": format_age(max(0.0, now - p.on_disk.created_unix_s)),
                "state": p.state.value,
                "user": p.user,
            }
            for p in self._core.node.processes.values()
            if p.on_disk is not None and (caller.privileged or caller.uid == p.uid)
        ]
        return {"snapshots": found}

    def start(self, op: Operation) -> None:
        """Begins a check or a deletion. Raises NotFound, IllegalTransition."""
        process = self._core.node.processes[op.tree_ids[0]]
        if process.on_disk is None:
            raise errors.NotFound(f"{process.name} has no snapshot on disk; it is {process.state}")
        if isinstance(op.params, m.DeleteSnapshot) and process.state is _S.HIBERNATED:
            raise errors.IllegalTransition(
                f"the snapshot is all there is of {process.name}; to give it up: gpusched kill {process.name}"
            )
        self._core.spawn(
            self._work(op, process, process.on_disk), f"{op.kind}-{process.name}", op.op_id
        )

    async def _work(self, op: Operation, process: Process, on_disk: OnDisk) -> None:
        result: dict[str, Any] = {"name": process.name, "size_mb": mib(on_disk.size_bytes)}
        try:
            if isinstance(op.params, m.VerifySnapshot):
                await self._core.ports.disk.verify(on_disk.image)
            else:
                await self._core.ports.disk.delete(on_disk.image)
        except errors.GpuschedError as error:
            self._core.post(Checked(op_id=op.op_id, error=error))
        else:
            self._core.post(Checked(op_id=op.op_id, result=result))

    def ended(self, op: Operation, event: Checked) -> None:
        """The work on an image has ended."""
        if event.error is not None:
            self._core.reply(op, error=event.error)
            return
        if isinstance(op.params, m.DeleteSnapshot):
            process = self._core.node.processes[op.tree_ids[0]]
            assert process.on_disk is not None
            self._core.node.images.discard(process.on_disk.image)
            self._core.forget_image(process.tree_id)
            self._core.finish(op, result=event.result)
            return
        self._core.reply(op, result=event.result)
