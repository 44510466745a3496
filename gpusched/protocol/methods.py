"""The METHODS table: what can be asked of the daemon, by whom, and what comes back.

The socket server dispatches by it and docs/protocol.md is generated from it; nothing else lists methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

from msgspec import Struct

from gpusched import types
from gpusched.protocol import messages as m


class Access(Enum):
    """Who may call a method; root and the configured group always may."""

    ANYONE = "anyone"
    OWNER = "the process's owner"
    PID_OWNER = "the owner of the pid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    params: type[Struct]
    result: Any  # a TypedDict of gpusched.types
    access: Access
    doc: str
    #: The goal already reached is a success, so the request may be sent again.
    idempotent: bool = False


METHODS: Final = MappingProxyType(
    {
        "run": Method(
            params=m.Run,
            result=types.RunResult,
            access=Access.ANYONE,
            doc="Start a command as the calling user on the given GPUs.",
        ),
        "adopt": Method(
            params=m.Adopt,
            result=types.AdoptResult,
            access=Access.PID_OWNER,
            doc="Take over a running process and its descendants.",
        ),
        "freeze": Method(
            params=m.Freeze,
            result=types.FreezeResult,
            access=Access.OWNER,
            idempotent=True,
            doc="Move a process's VRAM to host RAM and stop it; the GPU is free afterwards, "
            "with `keep_context` but for the CUDA context.",
        ),
        "thaw": Method(
            params=m.Thaw,
            result=types.ThawResult,
            access=Access.OWNER,
            idempotent=True,
            doc="Bring a frozen process back onto its GPUs and let it run.",
        ),
        "swap": Method(
            params=m.Swap,
            result=types.SwapResult,
            access=Access.OWNER,
            idempotent=True,
            doc="Freeze `off` and thaw `on` as one operation, rolled back whole.",
        ),
        "migrate": Method(
            params=m.Migrate,
            result=types.MigrateResult,
            access=Access.OWNER,
            idempotent=True,
            doc="Move a process to other GPUs; it is active there afterwards.",
        ),
        "kill": Method(
            params=m.Kill,
            result=types.KillResult,
            access=Access.OWNER,
            doc="End a process (SIGTERM, after a grace period SIGKILL) and forget it.",
        ),
        "acquire": Method(
            params=m.Acquire,
            result=types.AcquireResult,
            access=Access.OWNER,
            doc="Bring a process onto the GPU and keep it there while the lease lasts.",
        ),
        "release": Method(
            params=m.Release,
            result=types.ReleaseResult,
            access=Access.OWNER,
            idempotent=True,
            doc="End the caller's leases on a process.",
        ),
        "status": Method(
            params=m.NoParams,
            result=types.Status,
            access=Access.ANYONE,
            idempotent=True,
            doc="GPUs, processes, memory, metrics and the last 20 events. Never waits for a freeze.",
        ),
        "logs": Method(
            params=m.Logs,
            result=types.LogsResult,
            access=Access.OWNER,
            idempotent=True,
            doc='The last lines a process wrote; with `follow`, then one {"line": ...} a line.',
        ),
        "subscribe": Method(
            params=m.NoParams,
            result=types.Status,
            access=Access.ANYONE,
            doc="A status response, then one event object a line until either side closes.",
        ),
        "hibernate": Method(
            params=m.Hibernate,
            result=types.FreezeResult,
            access=Access.OWNER,
            idempotent=True,
            doc="Move a process to disk; it gives up its VRAM and its host RAM. `thaw` brings it back.",
        ),
        "fork": Method(
            params=m.Fork,
            result=types.ForkResult,
            access=Access.OWNER,
            doc="Make running copies of a process from one snapshot; it goes on as it was.",
        ),
        "snapshots": Method(
            params=m.NoParams,
            result=types.SnapshotsResult,
            access=Access.ANYONE,
            idempotent=True,
            doc="The snapshots on disk of the caller's processes.",
        ),
        "verify_snapshot": Method(
            params=m.VerifySnapshot,
            result=types.SnapshotResult,
            access=Access.OWNER,
            idempotent=True,
            doc="Read all of a process's snapshot and compare it with its checksums.",
        ),
        "delete_snapshot": Method(
            params=m.DeleteSnapshot,
            result=types.SnapshotResult,
            access=Access.OWNER,
            doc="Delete a snapshot that its process, which lives, does not need any more.",
        ),
    }
)
