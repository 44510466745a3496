"""The disk tier: isolated trees saved as images and brought back. Implements ``ports.Disk``.

Covers: what belongs to a tree beside its processes (its /dev/shm, what a simulated GPU holds of it), the order of
steps, what is in the way, and threads. Does not cover: CRIU's options and which CRIU (``criu/``), fresh namespaces
(``launching.py``), when anything is saved (the engine).

    IMAGE/          0700, root's; IMAGE.tmp until it is committed
        criu/       what CRIU wrote
        shm.tar     the tree's /dev/shm
        own-N.tar   directories outside of it that are the tree's alone
        meta.json   how it was started, the engine's record, sizes
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from gpusched import errors
from gpusched.mechanisms import disk_facts, proc
from gpusched.mechanisms.criu import run
from gpusched.mechanisms.criu.inside import Inside, open_log
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.namespaces import SHM
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.ports import (
    DiskFacts,
    DiskRoom,
    Identity,
    Image,
    Launch,
    Member,
    Revival,
    Saved,
    Woken,
)

T = TypeVar("T")
_THREADS: Final = 8


class DiskTier:
    """Images in one directory, which belongs to this daemon alone."""

    def __init__(
        self, trees: TreeKeeper, directory: Path, criu: Program | None, why_not: str
    ) -> None:
        """``why_not``: why nothing can be saved here; then ``criu`` is None."""
        self._trees = trees
        self._directory = directory
        self._criu = criu
        self._why_not = why_not
        self._sizes: dict[str, int] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="disk")

    def close(self) -> None:
        """Lets go of the threads; what is under way goes on to its end."""
        self._threads.shutdown(wait=False)

    async def _do(self, what: str, work: Callable[..., T], *args: Any) -> T:
        """``work`` on a thread; the system's errors become ours here."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        except OSError as error:
            raise _system_error(what, error) from error

    def why_not(self) -> str:
        return self._why_not

    def room(self) -> DiskRoom:
        """See ``ports.Disk``. Microseconds: the sizes of images are known."""
        try:
            free = shutil.disk_usage(self._directory).free if not self._why_not else 0
        except OSError:
            free = 0
        return DiskRoom(used_bytes=sum(self._sizes.values()), free_bytes=free)

    async def look(
        self, tree_id: str, main: Identity, members: Sequence[Member], record: Mapping[str, object]
    ) -> DiskFacts:
        launch = self._trees.launch_of(tree_id)
        log_path = launch.log_path if launch is not None else ""
        own = self._trees.own_directories(tree_id)
        return await self._do(
            "look at the process", disk_facts.look, main, list(members), log_path, own
        )

    # -- saving -----------------------------------------------------------------------------------

    async def save(
        self,
        image_id: str,
        tree_id: str,
        main: Identity,
        members: Sequence[Member],
        record: Mapping[str, object],
    ) -> Saved:
        pids = {m.pid: inner for m in members if (inner := proc.inner_pid(m.pid)) is not None}
        meta = {"record": record, "pids": {str(k): v for k, v in pids.items()}}
        need = (await self.look(tree_id, main, members, record)).need_bytes
        size = await self._do("write the image", self._save, image_id, tree_id, meta, need)
        self._sizes[image_id] = size
        return Saved(size_bytes=size, pids=pids)

    def _save(self, image_id: str, tree_id: str, meta: dict[str, Any], need_bytes: int) -> int:
        init, launch = self._trees.init_of(tree_id), self._trees.launch_of(tree_id)
        if init is None or launch is None:
            raise errors.CriuError(f"{tree_id} has lost its init, so it cannot be saved")
        assert self._criu is not None
        part = self._directory / f"{image_id}.tmp"
        part.mkdir(mode=0o700)
        try:
            (part / "criu").mkdir(mode=0o700)
            with _opened(part / "criu") as files, Inside(init) as inside:
                limit_s = run.time_limit_s(need_bytes)
                run.dump(self._criu, inside, files, name=launch.name, timeout_s=limit_s)
            for name, place in self._places(tree_id, init).items():
                _pack(place, part / f"{name}.tar")
            size = disk_facts.bytes_of(part)
            self._commit(part, {**meta, "launch": asdict(launch), "size_bytes": size})
        except BaseException:
            self._discard(part)
            raise
        return size

    def _commit(self, part: Path, meta: dict[str, Any]) -> None:
        meta["created_unix_s"] = time.clock_gettime(time.CLOCK_REALTIME)
        (part / "meta.json").write_text(json.dumps(meta))
        for path in (*part.rglob("*"), part):
            with _opened(path) as fd:
                os.fsync(fd)
        part.rename(part.with_suffix(""))
        with _opened(self._directory) as fd:
            os.fsync(fd)

    def _places(self, tree_id: str, init: Identity) -> dict[str, str]:
        """What is the tree's beside its processes, by the name of its part of the image."""
        places = {"shm": f"/proc/{init.pid}/root{SHM}"}
        for number, path in enumerate(self._trees.own_directories(tree_id)):
            places[f"own-{number}"] = str(path)
        return places

    # -- coming back ------------------------------------------------------------------------------

    async def changes(self, image_id: str) -> list[str]:
        await self._do("read the image", self._meta, image_id)
        return []

    async def wake(self, image_id: str, revival: Revival) -> Woken:
        return await self._do("bring the processes back", self._wake, image_id, revival)

    def _wake(self, image_id: str, revival: Revival) -> Woken:
        meta = self._meta(image_id)
        fields: dict[str, Any] = meta["launch"]
        fields |= {"argv": tuple(fields["argv"]), "groups": tuple(fields["groups"])}
        old = Launch(**fields)
        launch = replace(old, tree_id=revival.tree_id, name=revival.name, log_path=revival.log_path)
        with self._awaited(revival.tree_id):
            main = self._trees.revive(
                launch,
                lambda init: self._bring_back(
                    self._directory / image_id, launch, init, old.log_path
                ),
                own_network=revival.own_network,
                fresh_log=revival.fresh_log,
            )
        below = proc.scan().descendants({main.pid})
        return Woken(main=main, pids={i: pid for pid in below if (i := proc.inner_pid(pid))})

    def _bring_back(self, image: Path, launch: Launch, init: Identity, old_log: str) -> int:
        """Fills the fresh namespaces of ``init``; the pid of the main process inside."""
        assert self._criu is not None
        for name, place in self._places(launch.tree_id, init).items():
            _unpack(image / f"{name}.tar", place)
        with contextlib.ExitStack() as stack:
            inside = stack.enter_context(Inside(init))
            files = stack.enter_context(_opened(image / "criu"))
            inherited = {}
            if old_log != os.devnull:
                inherited[old_log] = open_log(inside, launch.log_path, launch.uid, launch.gid)
                stack.callback(os.close, inherited[old_log])
            # One at a time: CRIU makes files without a name anew under the same names, in directories that are shared.
            stack.enter_context(self._turns.setdefault(image.name, threading.Lock()))
            restored = run.restore(
                self._criu,
                inside,
                files,
                name=launch.name,
                timeout_s=run.time_limit_s(disk_facts.bytes_of(image)),
                inherited=inherited,
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
        if self._why_not:
            return []
        found = await self._do("look at the images", self._images)
        self._sizes = {image.image_id: image.size_bytes for image in found}
        return found

    def _images(self) -> list[Image]:
        assert self._criu is not None
        for init in self._trees.inits():  # what an earlier daemon had set to work there
            with contextlib.suppress(errors.NotFound, errors.Unsupported), Inside(init) as inside:
                run.end_running_criu(self._criu, inside)
        found = []
        for path in sorted(self._directory.iterdir()):
            if path.suffix == ".tmp":
                shutil.rmtree(path, ignore_errors=True)
            elif (path / "meta.json").exists():
                meta = self._meta(path.name)
                found.append(
                    Image(
                        image_id=path.name,
                        size_bytes=meta["size_bytes"],
                        created_unix_s=meta["created_unix_s"],
                        record=meta["record"],
                        pids={int(pid): inner for pid, inner in meta["pids"].items()},
                    )
                )
        return found

    async def verify(self, image_id: str) -> None:
        await self._do("read the image", self._meta, image_id)

    async def delete(self, image_id: str) -> None:
        for path in (self._directory / image_id, self._directory / f"{image_id}.tmp"):
            await self._do("delete the image", self._discard, path)
        self._sizes.pop(image_id, None)
        self._turns.pop(image_id, None)

    def _discard(self, path: Path) -> None:
        """Under another name first: what is half deleted is no image."""
        with contextlib.suppress(FileNotFoundError):
            gone = path.with_name(f"{path.name.removesuffix('.tmp')}.gone.tmp")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _meta(self, image_id: str) -> dict[str, Any]:
        """Raises NotFound."""
        try:
            found: dict[str, Any] = json.loads(
                (self._directory / image_id / "meta.json").read_text()
            )
        except FileNotFoundError:
            raise errors.NotFound(f"there is no image {image_id}") from None
        return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _pack(place: str, archive: Path) -> None:
    _tar(
        ["-C", place, "--one-file-system", "--sparse", "--numeric-owner", "-cf", str(archive), "."]
    )


def _unpack(archive: Path, place: str) -> None:
    _tar(["-C", place, "--numeric-owner", "-xpf", str(archive)])


def _tar(arguments: list[str]) -> None:
    """Raises OSError; a full disk is told by its number."""
    done = subprocess.run(
        ["tar", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        full = os.strerror(errno.ENOSPC) in done.stderr
        raise OSError(errno.ENOSPC if full else errno.EIO, done.stderr.strip()[-300:])


def _system_error(what: str, error: OSError) -> errors.GpuschedError:
    text = f"cannot {what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.InsufficientDisk(f"{text}; free some, or choose another with --disk-dir")
    return errors.CriuError(text, {"errno": errno.errorcode.get(error.errno or 0, "")})
