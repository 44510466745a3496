"""Process trees: starting a command under its supervisor, finding, signalling and outliving.

Covers: ``ports.Trees``. Does not cover: the supervisor itself (``supervisor.py``), what a tree is allowed to do, the
driver. See docs/decisions/0011-a-supervisor-for-each-tree.md.

A launched tree has a directory (``tree_files.py``), a supervisor and, where possible, a control group. An adopted
tree has none of them: it is its main process and that one's descendants.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gpusched import errors
from gpusched.mechanisms import cgroups, launching, membership, proc
from gpusched.mechanisms.tree_files import TreeFiles
from gpusched.ports import ExitStatus, Identity, Launch, Member

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TREE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
#: How long an exit status may take to appear once the main process has ended.
_STATUS_WAIT_S = 2.0
#: How long a start that was under way when the last daemon died may take to come to its end.
_STARTING_WAIT_S = 5.0
_POLL_S = 0.01
#: How old a look at /proc may be that finds members who were moved out of their tree's control group.
_MOVED_OUT_AGE_S = 1.0
#: Starts at the same time: of one user, whose directory or program may hang, and of everybody.
_STARTS_PER_UID = 2
_STARTS = 64
#: More processes than this are looked at and signalled on a thread: the loop must not wait for a fork bomb.
_MANY = 100


class TreeKeeper:
    """``ports.Trees`` for one state directory, on one event loop."""

    def __init__(
        self, state_dir: Path, *, with_groups: bool = True, binds: Sequence[tuple[str, str]] = ()
    ) -> None:
        """``binds``: see ``launching.Ground``."""
        self._root = state_dir / "trees"
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._boot_id = proc.boot_id()
        self._groups = cgroups.TreeGroups(enabled=with_groups)
        self._lists_children = proc.lists_children()
        # What the last look at each tree found, and when; only of trees that have a control group.
        self._looks: dict[str, tuple[float, dict[int, proc.Stat]]] = {}
        self._ground = launching.Ground(groups=self._groups, boot_id=self._boot_id, binds=binds)
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="trees")
        self._starts = ThreadPoolExecutor(max_workers=_STARTS, thread_name_prefix="starts")
        self._turns: dict[int, asyncio.Semaphore] = {}
        # What tells the members of a launched tree: its supervisor and its group. Read once from its directory.
        self._ties: dict[str, tuple[Identity | None, Path | None]] = {}

    def close(self) -> None:
        """Lets go of the threads; the trees live on."""
        self._threads.shutdown(wait=False)
        self._starts.shutdown(wait=False)

    # -- starting and ending ----------------------------------------------------------------------

    async def launch(self, launch: Launch) -> Identity:
        """See ``ports.Trees``. Cancelling abandons the wait, not the start.

        Also raises AlreadyExists (tree_id), PermissionDenied (another user's process, when not root),
        InsufficientDisk, Unavailable (no processes or descriptors left), DeadlineExceeded. After any error nothing
        runs and no file is left.
        """
        loop = asyncio.get_running_loop()
        files = self._files(launch.tree_id)
        turns = self._turns.setdefault(launch.uid, asyncio.Semaphore(_STARTS_PER_UID))
        async with turns:
            return await loop.run_in_executor(
                self._starts, launching.start, launch, files, self._ground
            )

    async def wait_exit(self, tree_id: str, main: Identity) -> ExitStatus:
        """See ``ports.Trees``. Cancelling leaves nothing open."""
        await self._wait_end(main)
        files = self._files(tree_id)
        deadline = asyncio.get_running_loop().time() + _STATUS_WAIT_S
        while True:
            supervised = files.is_supervised()
            # In this order: a supervisor that was gone before we looked has written all that it ever will.
            status = files.exit_status()
            if status is not None:
                return status
            if not supervised or asyncio.get_running_loop().time() > deadline:
                return ExitStatus()
            await asyncio.sleep(_POLL_S)

    async def _wait_end(self, main: Identity) -> None:
        while await self.is_alive(main):
            try:
                pidfd = os.pidfd_open(main.pid)
            except ProcessLookupError:
                return
            except OSError as error:  # no descriptors left: look again now and then
                logger.warning("cannot watch pid=%d reason=%s", main.pid, error)
                await asyncio.sleep(0.5)
                continue
            try:
                # Opened first, checked then: a descriptor of a successor would never fire for ours.
                if await self.is_alive(main):
                    await _readable(pidfd)
                return
            finally:
                os.close(pidfd)

    async def record_adopted(self, launch: Launch, main: Identity) -> None:
        """See ``ports.Trees``. Raises AlreadyExists, InsufficientDisk; then nothing was written."""
        await asyncio.get_running_loop().run_in_executor(
            self._threads,
            launching.record_adopted,
            launch,
            self._files(launch.tree_id),
            main,
        )

    async def exit_status(self, tree_id: str) -> ExitStatus | None:
        """How a launched tree's main process ended; None while it runs, and when nobody recorded it."""
        return self._files(tree_id).exit_status()

    def revive(
        self, launch: Launch, bring_back: Callable[[Identity], int], **how: object
    ) -> Identity:
        """Blocks; for the disk tier's threads. See ``launching.revive``. Raises AlreadyExists for a tree that lives."""
        files = self._files(launch.tree_id)
        self._ties.pop(launch.tree_id, None)
        try:
            return launching.revive(launch, files, self._ground, bring_back, **how)
        except FileExistsError:
            raise errors.AlreadyExists(f"tree {launch.tree_id} exists already") from None
        finally:
            self._ties.pop(launch.tree_id, None)

    def launch_of(self, tree_id: str) -> Launch | None:
        """How a tree was started; None where that is not recorded."""
        return self._files(tree_id).launch()

    def inits(self) -> dict[str, Identity]:
        """The supervisors of all trees that there are."""
        files = (TreeFiles(path) for path in self._root.iterdir())
        return {f.path.name: init for f in files if (init := f.supervisor()) is not None}

    def init_of(self, tree_id: str) -> Identity | None:
        """The supervisor of a tree, which is the init of an isolated one."""
        return self._tie(tree_id)[0]

    def own_directories(self, tree_id: str) -> list[Path]:
        """What lies outside the tree's directory and is its alone."""
        return self._ground.own_directories(tree_id)

    async def end(self, tree_id: str, main: Identity | None) -> None:
        """See ``ports.Trees``."""
        files = self._files(tree_id)
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._threads, launching.end, files):
            pid = main.pid if main else "?"
            raise errors.DriverError(
                f"pid {pid} did not end after SIGKILL: the kernel still holds it, see dmesg"
            )

    async def forget(self, tree_id: str) -> None:
        files = self._files(tree_id)
        _, group = self._tie(tree_id)
        self._ties.pop(tree_id, None)
        self._looks.pop(tree_id, None)
        if group is not None:
            cgroups.remove(group)

        def remove() -> None:
            for path in (
                *self._ground.own_directories(tree_id),
                files.path,
            ):  # what leads to the rest goes last
                shutil.rmtree(path, ignore_errors=True)

        await asyncio.get_running_loop().run_in_executor(self._threads, remove)

    # -- recovery ---------------------------------------------------------------------------------

    async def leftovers(self) -> list[tuple[str, Launch, Identity]]:
        """See ``ports.Trees``. Blocks up to 5 s for starts that are under way; files of starts that never came to
        anything are removed. Trees that ended are not included: ``exit_status`` tells of them until ``forget``.
        """
        deadline = asyncio.get_running_loop().time() + _STARTING_WAIT_S
        found = []
        for tree_id in sorted(p.name for p in self._root.iterdir() if _TREE_ID.fullmatch(p.name)):
            files = self._files(tree_id)
            # ASYNC110 wants an event; these are the files of another process.
            while files.is_starting() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
            if files.is_starting():
                logger.warning("start hangs, ending it tree=%s", tree_id)
                launching.abandon(files)
            launch, main = files.launch(), files.main()
            if main is None:
                await self.forget(tree_id)
            elif launch is not None and await self.is_alive(main):
                found.append((tree_id, launch, main))
        return found

    async def forget_all_but(self, known: Container[str]) -> None:
        """See ``ports.Trees``."""
        places = {self._root, *(path.parent for path in self._ground.own_directories("any"))}
        names = {path.name for place in places if place.is_dir() for path in place.iterdir()}
        for tree_id in sorted(filter(_TREE_ID.fullmatch, names)):
            main = self._files(tree_id).main()
            if tree_id not in known and (main is None or not await self.is_alive(main)):
                await self.forget(tree_id)

    # -- looking ----------------------------------------------------------------------------------

    async def identify(self, pid: int) -> Identity:
        return proc.identify(pid)

    async def is_alive(self, identity: Identity) -> bool:
        stat = proc.read_stat(identity.pid)
        return stat is not None and stat.is_alive and self._is(stat, identity)

    async def members(self, tree_id: str, main: Identity) -> list[Member]:
        """See ``ports.Trees``. Tens of microseconds for a tree with a control group, else some for each thread of it.

        The kernel's list of the group misses nobody but those who were moved out of it (by root, or by systemd on
        a user's behalf). These are found as descendants in a look that may be a second old.
        """
        supervisor, group = self._tie(tree_id)
        known = len(cgroups.pids(group)) if group is not None else 0

        def look() -> list[Member]:
            stats = self._look(tree_id, [i for i in (main, supervisor) if i], is_grouped=known > 0)
            if group is not None and known:
                membership.add_group(stats, group)
            if supervisor is not None:
                stats.pop(supervisor.pid, None)
            halted = membership.halted(stats)
            found = [
                m for stat in stats.values() if (m := membership.member(stat, stat.pid in halted))
            ]
            return sorted(found, key=lambda m: (m.pid != main.pid, m.start_ticks, m.pid))

        return await self._do(look, known or _MANY + 1)

    def _look(
        self, tree_id: str, roots: Sequence[Identity], *, is_grouped: bool
    ) -> dict[int, proc.Stat]:
        """``roots`` and their descendants as they are now; of a tree with a group, found a second ago at most."""
        when, before = self._looks.get(tree_id, (float("-inf"), {}))
        if is_grouped and time.monotonic() - when < _MOVED_OUT_AGE_S:
            return membership.read_again(before)
        began = time.monotonic()
        alive = {i.pid for i in roots if self._is(proc.read_stat(i.pid), i)}
        stats = membership.family(alive, listed=self._lists_children)
        if is_grouped:
            self._looks[tree_id] = began, dict(stats)
        return stats

    async def locate(self, pids: Sequence[int], mains: Mapping[str, Identity]) -> dict[int, str]:
        """See ``ports.Trees``. Walks up from each pid: tens of microseconds each, however many trees there are."""
        roots: dict[tuple[int, int], str] = {}
        groups: dict[Path, str] = {}
        for name, main in mains.items():
            supervisor, group = self._tie(name)
            for identity in (main, supervisor):
                if identity is not None and identity.boot_id == self._boot_id:
                    roots[identity.pid, identity.start_ticks] = name
            if group is not None:
                groups[group] = name
        if not pids:
            return {}
        # On a thread, for a chain of ancestors may be thousands long.
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._locate, pids, roots, groups
        )

    def _locate(
        self,
        pids: Sequence[int],
        roots: Mapping[tuple[int, int], str],
        groups: Mapping[Path, str],
    ) -> dict[int, str]:
        found = {}
        walked: dict[int, str | None] = {}
        for pid in pids:
            # An ancestor may end while we walk; the second walk starts at its heir.
            tree_id = (
                membership.walk_up(pid, roots, walked)
                or self._by_group(pid, groups)
                or membership.walk_up(pid, roots, walked)
            )
            if tree_id is not None:
                found[pid] = tree_id
        return found

    async def _do(self, work: Callable[[], T], processes: int) -> T:
        """``work`` on so many processes: here where they are few, which is ten times as fast."""
        if processes <= _MANY:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _by_group(self, pid: int, groups: Mapping[Path, str]) -> str | None:
        group = self._groups.of(pid) if groups else None
        candidates = (group, *group.parents) if group is not None else ()
        return next((groups[path] for path in candidates if path in groups), None)

    def _is(self, stat: proc.Stat | None, identity: Identity) -> bool:
        return (
            stat is not None
            and stat.start_ticks == identity.start_ticks
            and self._boot_id == identity.boot_id
        )

    def _tie(self, tree_id: str) -> tuple[Identity | None, Path | None]:
        if tree_id not in self._ties:
            files = self._files(tree_id)
            if not files.path.is_dir():  # not launched, or not yet
                return None, None
            self._ties[tree_id] = files.supervisor(), files.group()
        return self._ties[tree_id]

    # -- acting -----------------------------------------------------------------------------------

    async def signal(self, members: Sequence[Member], signal: int) -> None:
        def send() -> None:
            for member in members:
                try:
                    launching.send_signal(member.pid, member.start_ticks, signal)
                except OSError as error:
                    logger.warning("signal=%d pid=%d failed: %s", signal, member.pid, error)

        await self._do(send, len(members))

    async def set_oom_score(
        self, members: Sequence[Member], score: int | Mapping[int, int]
    ) -> dict[int, int]:
        """See ``ports.Trees``. Members that are gone, or may not be changed, are not in the result."""

        def write() -> dict[int, int]:
            old = {}
            for member in members:
                wanted = score if isinstance(score, int) else score.get(member.pid)
                if wanted is not None:
                    before = proc.set_oom_score(member.pid, member.start_ticks, wanted)
                    if before is not None:
                        old[member.pid] = before
            return old

        return await self._do(write, len(members))

    def _files(self, tree_id: str) -> TreeFiles:
        """Raises InvalidRequest for an id that could lead elsewhere."""
        if not _TREE_ID.fullmatch(tree_id):
            raise errors.InvalidRequest(f"{tree_id!r} is not a tree id")
        return TreeFiles(self._root / tree_id)


async def _readable(fd: int) -> None:
    """Waits until the descriptor is readable; for a pidfd, until the process has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ready.done():  # the loop calls for as long as the descriptor is readable
            ready.set_result(None)

    loop.add_reader(fd, tell)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
