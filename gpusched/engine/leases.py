"""Leases: the right of a process to stay on its GPU, for as long as a connection lives or until a time.

A lease stops evictions, and freeze, swap, migrate and kill by other clients unless they force it. Leases do not
exclude one another: several clients may hold the same process on the GPU.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any, Final

from gpusched import errors
from gpusched.engine.core import Core
from gpusched.engine.model import Caller, Lease, Process, TimedLease

#: Of one process, by the clock (all of these are in each of its journal records), and of one connection on it.
MAX_LEASES: Final = 64


class Leases:
    def __init__(self, core: Core) -> None:
        self._core = core

    def require_free(self, process: Process, caller: Caller | None, *, force: bool) -> None:
        """Raises LeaseHeld when somebody else's connection, or anybody's timed lease, keeps ``process``."""
        if force or caller is None:
            return
        now = self._core.unix_s
        others = [
            lease
            for lease in self._core.node.leases.values()
            if lease.tree_id == process.tree_id and lease.connection != caller.connection
        ]
        timed = [t for t in process.timed_leases if t.expires_unix_s > now]
        if not others and not timed:
            return
        left_s = max((t.expires_unix_s - now for t in timed), default=None)
        how_long = f"for {left_s:.0f} s more" if left_s is not None else "until its holder is done"
        release = f"end it with 'gpusched release {process.name}', " if timed and not others else ""
        raise errors.LeaseHeld(
            f"{process.name} is leased {how_long} ({len(others) + len(timed)} lease(s)); "
            f"wait, {release}or use --force",
            {"leases": len(others) + len(timed), "expires_in_s": left_s},
        )

    def require_few(self, process: Process, connection: int) -> None:
        """Raises Unavailable when the clock, or this connection, has as many leases on ``process`` as it may."""
        timed = sum(t.expires_unix_s > self._core.unix_s for t in process.timed_leases)
        held = sum(
            (lease.tree_id, lease.connection) == (process.tree_id, connection)
            for lease in self._core.node.leases.values()
        )
        if max(timed, held) >= MAX_LEASES:
            raise errors.Unavailable(
                f"{process.name} has {max(timed, held)} leases already; gpusched release {process.name}"
            )

    def grant(self, process: Process, caller: Caller | None, for_s: float | None) -> dict[str, Any]:
        """Gives a lease on an active process; the caller's connection holds it, or the clock does."""
        assert caller is not None
        lease_id = uuid.uuid4().hex[:12]
        now = self._core.unix_s
        if for_s is None:
            self._core.node.leases[lease_id] = Lease(
                lease_id=lease_id,
                tree_id=process.tree_id,
                uid=caller.uid,
                connection=caller.connection,
            )
            self._core.put(replace(process, last_used_unix_s=now))
        else:
            kept = tuple(t for t in process.timed_leases if t.expires_unix_s > now)
            lease = TimedLease(lease_id=lease_id, uid=caller.uid, expires_unix_s=now + for_s)
            self._core.put(replace(process, timed_leases=(*kept, lease), last_used_unix_s=now))
        self._core.events.emit("acquire", process.name)
        return {"lease": lease_id, "expires_s": for_s}

    def release(self, process: Process, caller: Caller) -> int:
        """Ends the caller's leases: those of this connection and, of the same user, the timed ones."""
        ended = self._core.drop_leases(
            lambda tree_id, connection: (
                (tree_id, connection) == (process.tree_id, caller.connection)
            )
        )
        now = self._core.unix_s
        kept = tuple(
            t
            for t in process.timed_leases
            if t.expires_unix_s > now and t.uid != caller.uid and not caller.privileged
        )
        ended += sum(t.expires_unix_s > now for t in process.timed_leases) - len(kept)
        self._core.put(replace(process, timed_leases=kept, last_used_unix_s=now))
        if ended:
            self._core.events.emit("release", process.name)
        return ended

    def end_overdue(self) -> None:
        """Those by the clock whose time is over."""
        now = self._core.unix_s
        for process in list(self._core.node.processes.values()):
            if any(t.expires_unix_s <= now for t in process.timed_leases):
                kept = tuple(t for t in process.timed_leases if t.expires_unix_s > now)
                self._core.put(replace(process, timed_leases=kept))
                self._core.events.emit("release", process.name, "the lease ran out")
