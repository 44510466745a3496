"""The disk tier: isolated trees saved as images and brought back. Implements ``ports.Disk``.

Covers: what belongs to a tree beside its processes (its /dev/shm, what a simulated GPU holds of it), the order of
steps, and threads. Does not cover: CRIU, the store of images and what is in the way (``criu/``), fresh namespaces
(``launching.py``), when anything is saved (the engine).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import manifest, preflight, run, system, tree
from gpusched.mechanisms.criu.image import About
from gpusched.mechanisms.criu.image import Image as StoredImage
from gpusched.mechanisms.criu.images import ImageStore, Listed
from gpusched.mechanisms.criu.inside import Inside, open_log
from gpusched.mechanisms.criu.parts import disk_bytes
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.ports import (
    Clock,
    Description,
    DiskFacts,
    DiskRoom,
    Identity,
    Image,
    Launch,
    Member,
    Obstacle,
    Revival,
    Saved,
    Woken,
)
from gpusched.units import MIB

T = TypeVar("T")
_THREADS: Final = 16
_SYS_RESOURCE: Final = 24


class DiskTier:
    """Images in one directory, which belongs to this daemon alone."""

    def __init__(
        self,
        trees: TreeKeeper,
        clock: Clock,
        root: Path,
        program: Program,
        driver: Description,
        absorb: Callable[[int], Awaitable[object]],
    ) -> None:
        """``absorb``: see ``ports.DriverApi``. Raises what ``ImageStore`` raises."""
        self._absorb = absorb
        self._trees = trees
        self._clock = clock
        self._store = ImageStore(root)
        self._program = program
        self._driver = driver
        self._sizes: dict[str, int] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._given_up: set[str] = set()
        restores = max(2, min(_THREADS // 2, len(os.sched_getaffinity(0)) // 2))
        self._restores = asyncio.Semaphore(restores)
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="disk")

    def close(self) -> None:
        """Lets go of the threads; what is under way goes on to its end."""
        self._threads.shutdown(wait=False)

    async def _do(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def why_not(self) -> str:
        return ""

    def room(self) -> DiskRoom:
        """See ``ports.Disk``. Microseconds: the sizes of images are known."""
        try:
            free = self._store.free_bytes()
        except OSError:
            free = 0
        return DiskRoom(used_bytes=sum(self._sizes.values()), free_bytes=free)

    async def look(
        self, tree_id: str, main: Identity, members: Sequence[Member], record: Mapping[str, object]
    ) -> DiskFacts:
        return await self._do(
            self._look, tree_id, bool(members) and all(m.stopped for m in members)
        )

    def _look(self, tree_id: str, is_frozen: bool) -> DiskFacts:
        init, launch = self._whose(tree_id)
        with _still_there(launch.name), Inside(init) as inside:
            tasks = inside.tasks()
            own = sum(_bytes_below(path) for path in self._trees.own_directories(tree_id))
            found = preflight.obstacles(inside, launch.name, gpu_released=is_frozen)
            if launch.uid != 0 and not proc.has_capability(_SYS_RESOURCE):
                found.append(_incapable(init.pid))
            return DiskFacts(
                obstacles=tuple(found),
                need_bytes=preflight.image_bytes(tasks) + preflight.shm_bytes(inside) + own + MIB,
                shared_files=tuple(preflight.writable_files(tasks, [launch.log_path])),
            )

    def _whose(self, tree_id: str) -> tuple[Identity, Launch]:
        init, launch = self._trees.init_of(tree_id), self._trees.launch_of(tree_id)
        if init is None or launch is None:
            raise errors.CriuError(f"{tree_id} has lost its init, so it cannot be saved")
        return init, launch

    # -- saving -----------------------------------------------------------------------------------

    async def save(
        self,
        image_id: str,
        tree_id: str,
        main: Identity,
        members: Sequence[Member],
        record: Mapping[str, object],
    ) -> Saved:
        for member in members:
            await self._absorb(member.pid)
        # Again: until it stood still, the tree could open things and have children that lose their parents.
        facts = await self.look(tree_id, main, members, record)
        preflight.require_none(facts.obstacles, self._whose(tree_id)[1].name)
        try:
            saved = await self._do(self._save, image_id, tree_id, facts.need_bytes, record)
        finally:
            self._given_up.discard(image_id)
        self._sizes[image_id] = saved.size_bytes
        return saved

    def give_up(self, image_id: str) -> None:
        """See ``ports.Disk``."""
        self._given_up.add(image_id)

    def _require_wanted(self, image_id: str) -> None:
        if image_id in self._given_up:
            raise errors.Cancelled("the process is wanted; it was not saved")

    def _save(
        self, image_id: str, tree_id: str, need_bytes: int, record: Mapping[str, object]
    ) -> Saved:
        init, launch = self._whose(tree_id)
        with (
            _still_there(launch.name),
            Inside(init) as inside,
            self._store.begin(image_id) as draft,
        ):
            pids = {task.pid: task.inner_pid for task in inside.tasks()}
            saved = tree.save(
                self._program,
                inside,
                draft,
                name=launch.name,
                timeout_s=run.time_limit_s(need_bytes),
                keep_cached=_is_for_copies(record),
                require_wanted=lambda: self._require_wanted(image_id),
            )
            try:
                for part, directory in self._own_parts(tree_id):
                    draft.save_directory(part, directory)
                self._require_wanted(image_id)
                draft.commit(self._about(launch, record, saved, pids))
                size = disk_bytes(draft.fd)
            except BaseException:
                run.undo_dump(inside, saved.captured)
                raise
        return Saved(size_bytes=size, pids=pids)

    def _about(
        self,
        launch: Launch,
        record: Mapping[str, object],
        saved: tree.Saved,
        pids: Mapping[int, int],
    ) -> About:
        vram = _vram_of(record)
        return About(
            name=launch.name,
            uid=launch.uid,
            created_unix_s=self._clock.unix_s(),
            machine=self._machine(vram),
            used=saved.used,
            unnamed=saved.unnamed,
            vram_bytes=vram,
            record={"engine": record, "launch": asdict(launch), "pids": list(pids.items())}
            | {"by_turns": saved.by_turns},
        )

    def _machine(self, vram_bytes: int) -> manifest.Machine:
        """Without VRAM contents in an image the driver does not matter to it."""
        return system.read_machine(self._program, self._driver if vram_bytes else None)

    def _own_parts(self, tree_id: str) -> Iterator[tuple[str, int]]:
        """What is the tree's outside of its namespaces: names of parts of the image, and directories, open by turns."""
        for number, path in enumerate(self._trees.own_directories(tree_id)):
            with _opened(path) as directory:
                yield f"own-{number}", directory

    # -- coming back ------------------------------------------------------------------------------

    async def changes(self, image_id: str) -> list[str]:
        return await self._do(self._changes, image_id)

    def _changes(self, image_id: str) -> list[str]:
        with self._store.open(image_id) as image:
            now = self._machine(image.manifest.vram_bytes)
            log_path = _launch_in(image.manifest).log_path
            return [str(d) for d in tree.differences(image, None, now, [log_path]) if d.blocks]

    async def wake(self, image_id: str, revival: Revival) -> Woken:
        async with contextlib.AsyncExitStack() as stack:
            if await self._do(self._is_by_turns, image_id):
                turn = self._turns.setdefault(image_id, asyncio.Lock())
                await stack.enter_async_context(turn)
            await stack.enter_async_context(self._restores)
            return await self._do(self._wake, image_id, revival)

    def _is_by_turns(self, image_id: str) -> bool:
        with self._store.open(image_id) as image:
            return bool(image.manifest.record.get("by_turns", True))

    def _wake(self, image_id: str, revival: Revival) -> Woken:
        with self._store.open(image_id) as image, self._awaited(revival.tree_id):
            launch = replace(
                _launch_in(image.manifest),
                tree_id=revival.tree_id,
                name=revival.name,
                log_path=revival.log_path,
            )
            main = self._trees.revive(
                launch,
                lambda init: self._bring_back(image, launch, init),
                own_network=revival.own_network,
                fresh_log=revival.fresh_log,
            )
        below = proc.scan().descendants({main.pid})
        return Woken(main=main, pids={i: pid for pid in below if (i := proc.inner_pid(pid))})

    def _bring_back(self, image: StoredImage, launch: Launch, init: Identity) -> int:
        """Fills the fresh namespaces of ``init``; the pid of the main process inside."""
        with contextlib.ExitStack() as stack:
            inside = stack.enter_context(Inside(init))
            inherited, old_log = {}, _launch_in(image.manifest).log_path
            if old_log != os.devnull:
                inherited[old_log] = open_log(inside, launch.log_path, launch.uid, launch.gid)
                stack.callback(os.close, inherited[old_log])
            for part, directory in self._own_parts(launch.tree_id):
                image.restore_directory(part, directory)
            own = {i for p in self._trees.own_directories(launch.tree_id) for i in _files(p)}
            restored = tree.bring_back(
                self._program,
                inside,
                image,
                name=launch.name,
                now=self._machine(image.manifest.vram_bytes),
                timeout_s=run.time_limit_s(image.manifest.size_bytes),
                inherited=inherited,
                own=own,
                keep_cached=_is_for_copies(image.manifest.record["engine"]),
            )
        return restored.main.inner_pid

    @contextlib.contextmanager
    def _awaited(self, tree_id: str) -> Iterator[None]:
        """While processes come back, what lies there for them belongs to nobody that lives, and is kept."""
        with contextlib.ExitStack() as stack:
            for path in self._trees.own_directories(tree_id):
                path.mkdir(mode=0o755, parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context(_opened(path)), fcntl.LOCK_SH)
            yield

    # -- images -----------------------------------------------------------------------------------

    async def images(self) -> list[Image]:
        found = await self._do(self._images)
        self._sizes = {image.image_id: image.size_bytes for image in found}
        return found

    def _images(self) -> list[Image]:
        for tree_id, init in self._trees.inits().items():
            with contextlib.suppress(errors.NotFound, errors.Unsupported), Inside(init) as inside:
                self._recover(tree_id, inside)
        self._store.collect()
        return [_told(each) for each in self._store.images()]

    def _recover(self, tree_id: str, inside: Inside) -> None:
        """Ends what an earlier daemon had set to work on a tree, and puts its processes back as they were."""
        run.end_running_criu(self._program, inside)
        for path in self._store.root.glob(f"{tree_id}-*.tmp"):
            tree.recover(self._program, inside, self._store, path.name.removesuffix(".tmp"))

    async def verify(self, image_id: str) -> None:
        await self._do(self._verify, image_id)

    def _verify(self, image_id: str) -> None:
        with self._store.open(image_id) as image:
            image.verify()

    async def delete(self, image_id: str) -> None:
        with contextlib.suppress(errors.NotFound):
            await self._do(self._store.delete, image_id)
        self._sizes.pop(image_id, None)
        self._turns.pop(image_id, None)
        self._given_up.discard(image_id)


def _told(listed: Listed) -> Image:
    about = listed.manifest
    if about is None:
        size, problem = listed.disk_bytes, listed.problem
        return Image(image_id=listed.image_id, size_bytes=size, problem=problem)
    return Image(
        image_id=listed.image_id,
        size_bytes=listed.disk_bytes,
        created_unix_s=about.created_unix_s,
        record=about.record["engine"],
        pids=dict(about.record["pids"]),
    )


def _incapable(pid: int) -> Obstacle:
    """The limits of other users' processes are not root's to read without it, and CRIU reads them."""
    return Obstacle(
        pid=pid,
        kind="capability",
        message="the daemon lacks the capability SYS_RESOURCE, without which only root's own processes can be saved; "
        "give it to its container",
    )


def _launch_in(about: manifest.Manifest) -> Launch:
    fields: dict[str, Any] = dict(about.record["launch"])
    return Launch(**fields | {name: tuple(fields[name]) for name in ("argv", "groups")})


def _is_for_copies(record: Mapping[str, object]) -> bool:
    """It comes back at once, and as often as there are copies."""
    return record.get("for") == "copies"


def _vram_of(record: Mapping[str, object]) -> int:
    process = record.get("proc")
    held = process.get("vram") if isinstance(process, dict) else None
    return sum(held.values()) if isinstance(held, dict) else 0


def _files(directory: Path) -> Iterator[tuple[int, int]]:
    """(device, inode) of all below."""
    for path in directory.rglob("*"):
        about = path.lstat()
        yield about.st_dev, about.st_ino


def _bytes_below(directory: Path) -> int:
    """What the files below take; holes take nothing."""
    found = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            found += path.lstat().st_blocks * 512
    return found


@contextlib.contextmanager
def _still_there(name: str) -> Iterator[None]:
    """The namespaces of a tree end with its init, whatever we are doing there."""
    try:
        yield
    except errors.NotFound as error:
        raise errors.CriuError(f"{name} ended while it was saved: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
