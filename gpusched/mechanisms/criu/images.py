"""The images of saved trees: one directory for each, complete and on disk, or none. Blocking; root only.

    ROOT/ID.tmp/        being written, or left by somebody who died: no image
    ROOT/ID/            an image
        criu/           CRIU's files
        NAME.tar        a directory that was the tree's own (``Draft.save_directory``)
        ...             whatever else the caller writes (VRAM)
        kept/N          copies of mapped programs and libraries
        manifest        all of it with sizes and checksums, and what must be unchanged (``manifest.py``)
    ROOT/ID.gone/       being deleted

The order of a commit: all files are durable, then the manifest, then the directory, then its name, then the directory
above. So what has its final name is complete after any crash, and only then may the original be killed.

Only root can enter ROOT. Everything below is opened by descriptor, without following symbolic links.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpusched import errors
from gpusched.mechanisms.criu.image import CRIU, Draft, Image
from gpusched.mechanisms.criu.manifest import Manifest, Unreadable
from gpusched.mechanisms.criu.parts import DIRECTORY, disk_bytes, exists, read_manifest, understood

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_TMP, _GONE = ".tmp", ".gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One image of the store. ``manifest`` is None where it cannot be read; ``problem`` says why."""

    image_id: str
    disk_bytes: int
    manifest: Manifest | None
    problem: str = ""


class ImageStore:
    """Raises InsufficientDisk, PermissionDenied or Unavailable when the directory cannot be made or used."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with understood(root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(root, DIRECTORY)
        about = os.fstat(self._fd)
        if about.st_uid != os.geteuid() or (about.st_mode & 0o077 and os.listdir(self._fd)):  # noqa: PTH208
            os.close(self._fd)
            raise errors.PermissionDenied(
                f"{root} (uid {about.st_uid}, mode {about.st_mode & 0o7777:04o}) is not a directory of the daemon's "
                "own, which images need: choose another with --disk-dir"
            )
        os.fchmod(self._fd, 0o700)

    def close(self) -> None:
        os.close(self._fd)

    def begin(self, image_id: str) -> Draft:
        """Raises AlreadyExists, InsufficientDisk, Unavailable."""
        name = _checked(image_id)
        if exists(self._fd, name):
            raise errors.AlreadyExists(f"image {image_id} exists already")
        with understood(self.root):
            try:
                os.mkdir(name + _TMP, 0o700, dir_fd=self._fd)
            except FileExistsError:
                raise errors.AlreadyExists(f"image {image_id} is being written") from None
            try:
                fd = os.open(name + _TMP, DIRECTORY, dir_fd=self._fd)
                return Draft(self.root, image_id, fd, self._publish, self.discard)
            except OSError:
                self.discard(image_id)
                raise

    def open(self, image_id: str) -> Image:
        """Raises NotFound, CriuError (its manifest cannot be read)."""
        try:
            fd = os.open(_checked(image_id), DIRECTORY, dir_fd=self._fd)
        except OSError:
            raise errors.NotFound(f"there is no image {image_id} in {self.root}") from None
        try:
            return Image(self.root, image_id, fd, read_manifest(fd, image_id))
        except Unreadable as error:
            os.close(fd)
            raise errors.CriuError(
                f"image {image_id} in {self.root} cannot be used: {error}", {"image": image_id}
            ) from error

    def images(self) -> list[Listed]:
        """All images, the damaged ones too. Blocks for a look at every file."""
        found = []
        for name in sorted(os.listdir(self._fd)):  # noqa: PTH208
            if _ID.fullmatch(name):
                with contextlib.suppress(OSError):
                    found.append(self._listed(name))
        return found

    def _listed(self, name: str) -> Listed:
        fd = os.open(name, DIRECTORY, dir_fd=self._fd)
        try:
            size = disk_bytes(fd)
            try:
                return Listed(image_id=name, disk_bytes=size, manifest=read_manifest(fd, name))
            except Unreadable as error:
                return Listed(image_id=name, disk_bytes=size, manifest=None, problem=str(error))
        finally:
            os.close(fd)

    def delete(self, image_id: str) -> None:
        """From the first moment on there is no image any more. Raises NotFound, Unavailable."""
        name = _checked(image_id)
        with understood(self.root):
            try:
                os.rename(name, name + _GONE, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except FileNotFoundError:
                raise errors.NotFound(f"there is no image {image_id} in {self.root}") from None
            os.fsync(self._fd)
            self._remove(name + _GONE)

    def collect(self) -> list[str]:
        """Removes what others left half written or half deleted; never an image. Returns the names.

        For the start of a daemon, when nothing is being written and no CRIU is at work.
        """
        left = [name for name in os.listdir(self._fd) if name.endswith((_TMP, _GONE))]  # noqa: PTH208
        with understood(self.root):
            for name in left:
                self._remove(name)
        return left

    def free_bytes(self) -> int:
        about = os.fstatvfs(self._fd)
        return about.f_bavail * about.f_frsize

    def used_bytes(self) -> int:
        """What all of it takes of the disk, drafts included."""
        return disk_bytes(self._fd)

    def _remove(self, name: str) -> None:
        shutil.rmtree(name, dir_fd=self._fd)

    def _publish(self, image_id: str) -> None:
        """The last steps of a commit. On an error there is no image, and the draft is as it was. Raises OSError."""
        draft = image_id + _TMP
        os.rename(draft, image_id, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        try:
            os.fsync(self._fd)
        except OSError:  # it may survive a crash or not; the original lives, so let there be none
            os.rename(image_id, draft, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            raise

    def discard(self, image_id: str) -> None:
        """Removes a draft; nothing where there is none. Raises Unavailable."""
        with contextlib.suppress(FileNotFoundError), understood(self.root):
            self._remove(_checked(image_id) + _TMP)

    @contextlib.contextmanager
    def draft_of(self, image_id: str) -> Iterator[int | None]:
        """CRIU's directory in what somebody has left half written; None where there is none."""
        try:
            fd = os.open(f"{_checked(image_id)}{_TMP}/{CRIU}", DIRECTORY, dir_fd=self._fd)
        except OSError:
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)


def _checked(image_id: str) -> str:
    if not _ID.fullmatch(image_id):
        raise errors.InvalidRequest(f"{image_id!r} cannot be the id of an image")
    return image_id
