"""Copies of the programs and libraries that saved processes have mapped: an upgrade must not strand an image.

Covers: keeping them in an image where that is cheap (reflink, small copies), and showing them to what CRIU brings back
in the place of what is there now, for as long as the restore takes. Blocking; root only.

Never a hard link: whoever writes to a file of an image, or truncates it, would do that to the system's library.

From when CRIU has loaded its own libraries (it is today's, and may need today's) until the processes are back, while
they are all stopped: afterwards they have the old files mapped, and nobody in their namespaces can start a set-user-id
program with libraries that were replaced for a reason. Only what is there under its old name can be covered; a file
that is gone blocks the restore.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from gpusched import errors
from gpusched.mechanisms.criu import mounts, system
from gpusched.mechanisms.criu.image import KEPT, Draft, Image
from gpusched.mechanisms.criu.inside import RESOLVE_NO_SYMLINKS, Inside
from gpusched.mechanisms.criu.manifest import UsedFile, is_same
from gpusched.mechanisms.criu.parts import understood
from gpusched.mechanisms.criu.system import Seen
from gpusched.units import MIB

#: Where no reflink is possible, so much is copied: of one file, and of all.
_COPY_FILE_BYTES: Final = 32 * MIB
COPY_ALL_BYTES: Final = 128 * MIB
_FICLONE: Final = 0x40049409


def keep(draft: Draft, inside: Inside, used: Sequence[UsedFile]) -> tuple[UsedFile, ...]:
    """Puts the mapped programs and libraries into the draft; returns all files, those kept with their name in it.

    What cannot be kept cheaply is left out without a word. Raises InsufficientDisk, Unavailable.
    """
    found, room = [], COPY_ALL_BYTES
    with understood(draft.root), _directory(draft) as directory:
        for number, file in enumerate(used):
            name = str(number)
            copied = None
            if file.mapped and file.stamp.elf and not file.writable:
                copied = _keep_one(inside, file, directory, name, room)
            room -= copied or 0
            found.append(file if copied is None else msgspec.structs.replace(file, kept=name))
        os.fsync(directory)
    return tuple(found)


@contextlib.contextmanager
def _directory(draft: Draft) -> Iterator[int]:
    os.mkdir(KEPT, 0o700, dir_fd=draft.fd)
    fd = os.open(KEPT, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=draft.fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _keep_one(inside: Inside, file: UsedFile, directory: int, name: str, room: int) -> int | None:
    """Returns the bytes that were copied; None where it was not kept.

    The path is the user's, who may have put something else there since it was looked at.
    """
    try:
        seen = inside.open(file.path, os.O_PATH | os.O_NOFOLLOW, resolve=RESOLVE_NO_SYMLINKS)
    except OSError:
        return None
    try:
        mode = os.fstat(seen).st_mode  # opening a pipe waits, and a device may act
        if not stat.S_ISREG(mode) or mode & 0o6000:  # nothing that gives anybody rights is kept
            return None
        return _copy(seen, directory, name, min(room, _COPY_FILE_BYTES))
    finally:
        os.close(seen)


def _copy(seen: int, directory: int, name: str, room: int) -> int | None:
    source = os.open(f"/proc/self/fd/{seen}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(source).st_size
        target = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=directory)
        try:
            copied = _clone(source, target, size, room)
            about = os.fstat(source)
            os.fchown(target, about.st_uid, about.st_gid)
            os.fchmod(target, about.st_mode & 0o777)
            os.utime(target, ns=(about.st_atime_ns, about.st_mtime_ns))
            os.fsync(target)
        finally:
            os.close(target)
        if copied is None:
            os.unlink(name, dir_fd=directory)
        return copied
    finally:
        os.close(source)


def _clone(source: int, target: int, size: int, room: int) -> int | None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return 0
    if size > room:
        return None
    done = 0
    while count := os.sendfile(target, source, done, size - done) if done < size else 0:
        done += count
    return done if done == size else None


# -- in the place of what is there now ------------------------------------------------------------


class Covers:
    """The kept files that are to lie over those that have changed. ``seen``: what is seen there then."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._fds = contextlib.ExitStack()
        self._pairs: dict[str, tuple[int, int]] = {}
        self._laid: list[int] = []
        self.seen: dict[str, Seen] = {}

    def add(self, image: Image, file: UsedFile) -> None:
        """Raises CriuError where the kept file is damaged or nothing can lie over what is there."""
        assert file.kept is not None
        try:
            kept = self._open(f"{image.path}/{KEPT}/{file.kept}", 0)
            seen = system.see(os.dup(kept))
            # A link in the way would lead to any place.
            target = self._open(file.path, RESOLVE_NO_SYMLINKS)
        except OSError as error:
            raise _failed(file.path, str(error)) from error
        if seen is None or not is_same(file.stamp, seen.stamp):
            raise _failed(file.path, "it is damaged")
        self._pairs[file.path] = kept, target
        self.seen[file.path] = seen

    def _open(self, path: str, resolve: int) -> int:
        fd = self._inside.open(path, os.O_PATH | os.O_NOFOLLOW, resolve=resolve)
        self._fds.callback(os.close, fd)
        return fd

    def lay(self) -> None:
        """Raises CriuError."""
        try:
            mounts.lay(self._inside.mount_namespace, list(self._pairs.values()), self._laid)
        except OSError as error:
            raise _failed(", ".join(self._pairs), str(error)) from error

    def lift(self) -> None:
        """What lies there is taken away; closes all. Raises CriuError."""
        with self._fds:
            try:
                if self._laid:
                    mounts.lift(self._inside.mount_namespace, self._laid)
            except OSError as error:
                raise _failed(", ".join(self._pairs), f"it stays there: {error}") from error
            finally:
                for fd in self._laid:
                    os.close(fd)


@contextlib.contextmanager
def covering(image: Image, inside: Inside, now: Mapping[str, Seen | None]) -> Iterator[Covers]:
    """Around a restore: kept files for those that have changed, to be laid over them once CRIU has its own libraries.

    ``now``: the used files as they are (``system.look``). Everybody inside must be stopped when the block ends, which
    takes them away again. Raises CriuError when a kept file is damaged or cannot be laid over anything.
    """
    covers = Covers(inside)
    try:
        for file in image.manifest.used:
            seen = now.get(file.path)
            if file.kept is not None and seen is not None and not is_same(file.stamp, seen.stamp):
                covers.add(image, file)
        yield covers
    finally:
        covers.lift()


def _failed(path: str, reason: str) -> errors.CriuError:
    return errors.CriuError(f"the kept copy of {path} cannot be put into its place: {reason}")
