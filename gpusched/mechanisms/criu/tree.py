"""A whole tree to an image and back: the steps of CRIU, of its files and of its checks in their order. Blocking.

    saving:    dump, its /dev/shm, what it relies on, copies of its libraries; then ``Draft.commit``, and only then the
               end of the original
    bringing   what must be unchanged, kept libraries over changed ones, its /dev/shm, checksums, the restore, what the
    back:      processes have open; then they may go on, and only after that ``ImageStore.delete``

Does not cover: GPU state, and which namespaces. Root only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpusched import errors
from gpusched.mechanisms.criu import kept, manifest, opened, preflight, run, system
from gpusched.mechanisms.criu.image import Draft, Image
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside
from gpusched.mechanisms.criu.manifest import Difference, Machine, Unnamed, UsedFile
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.criu.run import MAIN_PID, Restored
from gpusched.mechanisms.criu.system import Seen
from gpusched.mechanisms.criu.threads import Captured

SHM = "/dev/shm"  # noqa: S108 - this mount point, not a file in it
_SHM_PART = "shm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A tree in a draft: how long CRIU took, what the tree relies on beside the image, and for ``run.undo_dump``.

    ``by_turns``: two restores of the image at the same time would be in each other's way.
    """

    dump_s: float
    by_turns: bool
    used: tuple[UsedFile, ...]
    unnamed: tuple[Unnamed, ...]
    captured: Captured


def save(
    program: Program,
    inside: Inside,
    draft: Draft,
    *,
    name: str,
    timeout_s: float,
    main_pid: int = MAIN_PID,
    keep_cached: bool = False,
    require_wanted: Callable[[], None] | None = None,
) -> Saved:
    """Puts a tree into a draft and leaves it stopped; what is returned goes into ``About``.

    ``keep_cached``: it will come back at once (a fork), so the image stays in the page cache. ``require_wanted``: as
    for ``run.dump``.

    Raises what ``run.dump`` does, and Unsupported: then every process is as it was before. When the commit fails after
    it, call ``run.undo_dump``.
    """
    with draft.following(keep_cached=keep_cached):
        done = run.dump(
            program,
            inside,
            draft.criu_fd,
            name=name,
            timeout_s=timeout_s,
            main_pid=main_pid,
            require_wanted=require_wanted,
        )
    try:
        with _directory(inside, SHM) as shm:
            draft.save_directory(_SHM_PART, shm)
        tasks = inside.tasks()
        # Who has lost its parents since they were looked for is not in the image, and would be lost with the original.
        preflight.require_none(
            preflight.judge_orphans(inside.init.pid, tasks, name, main_pid), name
        )
        unnamed = opened.unnamed_files(tasks)
        by_turns = opened.has_fixed_names(inside, tasks)
        used = kept.keep(draft, inside, system.used_files(inside, tasks))
    except BaseException:
        run.undo_dump(inside, done.captured)
        raise
    return Saved(
        dump_s=done.duration_s,
        by_turns=by_turns,
        used=used,
        unnamed=unnamed,
        captured=done.captured,
    )


def recover(program: Program, inside: Inside, store: ImageStore, image_id: str) -> None:
    """What an earlier daemon left of a save: CRIU is ended, every process is as it was before, the draft is removed.

    Does nothing where there is no draft. An image that is complete is not touched. Raises DeadlineExceeded,
    Unavailable.
    """
    with store.draft_of(image_id) as images:
        if images is not None:
            run.recover_dump(program, inside, images)
        else:
            run.end_running_criu(program, inside)
    store.discard(image_id)


def differences(
    image: Image, inside: Inside | None, now: Machine, replaced: Collection[str] = ()
) -> list[Difference]:
    """What has changed since the image was made (``manifest.compare``), as fresh namespaces see it (None: would
    see it). Changes nothing.

    ``replaced``: paths that are given anew (the log).
    """
    seen = system.look(inside, (file.path for file in image.manifest.used))
    stamps = {path: one.stamp if one else None for path, one in seen.items()}
    return manifest.compare(image.manifest, now, stamps, replaced)


def bring_back(
    program: Program,
    inside: Inside,
    image: Image,
    *,
    name: str,
    now: Machine,
    timeout_s: float,
    inherited: Mapping[str, int] | None = None,
    own: Collection[tuple[int, int]] = (),
    main_pid: int = MAIN_PID,
    keep_cached: bool = False,
) -> Restored:
    """Brings a tree back into fresh namespaces, verified and stopped; ``run.resume`` lets it go on.

    ``inherited``: as for ``run.restore``. ``own``: (device, inode) of what the caller has put there. ``keep_cached``:
    others read the image too (a fork), so it stays in the page cache. Raises CriuError
    (damaged, changed, or CRIU failed), DeadlineExceeded, Unavailable: then nothing of it runs or is left in the
    namespaces, and the image is as it was.
    """
    given = dict(inherited or {})
    seen = system.look(inside, (file.path for file in image.manifest.used))
    stamps = {path: one.stamp if one else None for path, one in seen.items()}
    _require_unchanged(name, manifest.compare(image.manifest, now, stamps, given))
    try:
        with (
            kept.covering(image, inside, seen) as covers,
            _criu_directory(image) as images,
            image.verifying(None if keep_cached else lambda: _resident_bytes(inside)),
        ):
            with _directory(inside, SHM) as shm:
                image.restore_directory(_SHM_PART, shm)
            back = run.restore(
                program,
                inside,
                images,
                name=name,
                timeout_s=timeout_s,
                inherited=given,
                main_pid=main_pid,
                once_loaded=covers.lay if covers.seen else None,
            )
            allowed = {one.identity for one in [*_known(image, seen), *covers.seen.values()]}
            allowed |= {_identity(fd) for fd in given.values()} | set(own)
            opened.check(inside, back.tasks, allowed, image.manifest.unnamed, name)
    except BaseException:
        run.end_everybody(inside)
        raise
    return back


def _require_unchanged(name: str, changed: Collection[Difference]) -> None:
    if blocking := [one.message for one in changed if one.blocks]:
        raise errors.CriuError(
            f"{name} cannot come back: {'; '.join(blocking)}", {"changes": blocking}
        )


def _resident_bytes(inside: Inside) -> int:
    """How much of the tree's memory is there again."""
    total = 0
    for pid in inside.everybody():
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return total * mmap.PAGESIZE


def _known(image: Image, seen: Mapping[str, Seen | None]) -> Iterator[Seen]:
    """What is there and was compared: a file that has changed is not what a process may have."""
    for file in image.manifest.used:
        one = seen[file.path]
        if one is not None and manifest.is_same(file.stamp, one.stamp):
            yield one


def _identity(fd: int) -> tuple[int, int]:
    about = os.fstat(fd)
    return about.st_dev, about.st_ino


@contextlib.contextmanager
def _directory(inside: Inside, path: str) -> Iterator[int]:
    try:
        fd = inside.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise errors.Unavailable(f"{path} of the tree cannot be opened: {error}") from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _criu_directory(image: Image) -> Iterator[int]:
    fd = image.open_criu()
    try:
        yield fd
    finally:
        os.close(fd)
