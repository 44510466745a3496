"""Processes and their descendants. See the package."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process for ever: a pid alone is reused. ``start_ticks`` is field 22 of /proc/PID/stat."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of a tree, read from /proc at one instant."""

    pid: int
    start_ticks: int
    ruid: int
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """All that a supervisor needs to start a command. Paths are absolute; ``env`` is complete.

    ``isolated``: in a PID and mount namespace of the tree's own, which is what can be saved to disk. ``stop``: whether
    a freeze stops its CPU threads.
    """

    tree_id: str
    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    log_path: str
    isolated: bool = False
    stop: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How the main process of a tree ended. Both None: it ended and nobody saw how (adopted processes)."""

    code: int | None = None
    signal: int | None = None


class Trees(Protocol):
    """Processes and their descendants: starting, finding, stopping, ending. Never signals a bare pid."""

    async def launch(self, launch: Launch) -> Identity:
        """Starts a command under its own supervisor, which outlives the daemon.

        Raises InvalidRequest when the command cannot be executed (no such file, no permission, bad cwd).
        """
        ...

    async def identify(self, pid: int) -> Identity:
        """Raises NotFound when no such process runs."""
        ...

    async def is_alive(self, identity: Identity) -> bool: ...

    async def members(self, tree_id: str, main: Identity) -> list[Member]:
        """Every live process of the tree, the main one first; empty when all are gone. Zombies are left out."""
        ...

    async def locate(self, pids: Sequence[int], mains: Mapping[str, Identity]) -> dict[int, str]:
        """Which of the trees ``mains`` (tree id -> main process) each pid belongs to; others are left out."""
        ...

    async def signal(self, members: Sequence[Member], signal: int) -> None:
        """Sends by pidfd, after checking each start time; members that are gone are passed over."""
        ...

    async def set_oom_score(
        self, members: Sequence[Member], score: int | Mapping[int, int]
    ) -> dict[int, int]:
        """Sets oom_score_adj, for all or for each pid; returns the old ones. Never raises."""
        ...

    async def wait_exit(self, tree_id: str, main: Identity) -> ExitStatus:
        """Returns when the main process has ended; at most 2 s later than that the status is known or never."""
        ...

    async def record_adopted(self, launch: Launch, main: Identity) -> None:
        """Writes the per-tree record of a process that somebody else started, so that recovery can find it."""
        ...

    async def exit_status(self, tree_id: str) -> ExitStatus | None:
        """What the supervisor wrote when the main process ended; None while it lives or where nobody wrote."""
        ...

    async def leftovers(self) -> list[tuple[str, Launch, Identity]]:
        """Trees that a supervisor of this state directory started and that still run, for recovery."""
        ...

    async def end(self, tree_id: str, main: Identity | None) -> None:
        """Ends all of an isolated tree at once, by its init; returns when nothing of it is left.

        Raises DriverError when the kernel does not let go of it within a minute.
        """
        ...

    async def forget_all_but(self, known: Container[str]) -> None:
        """``forget`` for every tree that is not running and not among the ``known`` ids: a daemon that was killed
        while it forgot one has left the rest of it.
        """
        ...

    async def forget(self, tree_id: str) -> None:
        """Removes the supervisor's files of a tree that has ended."""
        ...
