"""One image: a draft that becomes durable as a whole, and the image that is read again. Blocking; root only.

See ``images.py`` for the files and for what is above them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from gpusched import errors
from gpusched.mechanisms.criu import checksums, manifest
from gpusched.mechanisms.criu.checksums import Damaged, FileSum, Follower, Pace
from gpusched.mechanisms.criu.manifest import Machine, Manifest, Unnamed, UsedFile
from gpusched.mechanisms.criu.parts import (
    DIRECTORY,
    MANIFEST,
    archive_name,
    fsync,
    full,
    pack,
    stat_at,
    understood,
    unpack,
)

CRIU: Final = "criu"
KEPT: Final = "kept"
Step = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the caller tells of an image when it is committed. ``record`` must be JSON-able."""

    name: str
    uid: int
    created_unix_s: float
    machine: Machine
    used: tuple[UsedFile, ...] = ()
    unnamed: tuple[Unnamed, ...] = ()
    vram_bytes: int = 0
    record: Mapping[str, Any] | None = None


class Draft:
    """An image that is being written. As a context manager it discards itself unless it was committed.

    ``fd`` is its directory, ``criu_fd`` the one for CRIU. Others may write further files, with plain names.
    """

    def __init__(self, root: Path, image_id: str, fd: int, publish: Step, discard: Step) -> None:
        """``publish`` and ``discard`` are the store's: the last step, and what happens without it. Raises OSError."""
        self.root, self.image_id, self.fd = root, image_id, fd
        self._publish, self._discard = publish, discard
        os.mkdir(CRIU, 0o700, dir_fd=fd)
        self.criu_fd = os.open(CRIU, DIRECTORY, dir_fd=self.fd)
        self._committed = False
        self._sums: dict[str, FileSum] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.criu_fd)
        os.close(self.fd)
        if not self._committed:
            self._discard(self.image_id)

    @contextlib.contextmanager
    def following(self, *, keep_cached: bool = False) -> Iterator[None]:
        """Around a dump: sums the memory that CRIU writes, and has the disk begin, while it is written.

        ``keep_cached``: it will be read at once (a fork), so it stays in the page cache.
        """
        follower = Follower(self.criu_fd, "pages-", keep_cached=keep_cached)
        try:
            yield
        finally:
            sums = follower.finish()
        self._sums = {f"{CRIU}/{name}": one for name, one in sums.items()}

    def save_directory(self, part: str, directory: int) -> None:
        """Puts all that is in a directory into PART.tar; what is mounted below it is left out.

        Its processes must be stopped. Blocks for the copying. Raises CriuError, InsufficientDisk, Unavailable.
        """
        name, flags = archive_name(part), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        with understood(self.root):
            out = os.open(name, flags, 0o600, dir_fd=self.fd)
        try:
            pack(directory, out)
        except errors.CriuError:
            if os.fstatvfs(out).f_bavail == 0:
                raise full(self.root) from None
            raise
        finally:
            os.close(out)

    def commit(self, about: About) -> Manifest:
        """Returns when the image is complete and durable. Blocks for what the disk has not written yet.

        Raises InsufficientDisk, Unavailable (the disk fails): then there is no image, and the draft is to be
        discarded. The original must live until this has returned.
        """
        with understood(self.root):
            files = self._sum_all()
            made = Manifest(
                image_id=self.image_id,
                name=about.name,
                uid=about.uid,
                created_unix_s=about.created_unix_s,
                vram_bytes=about.vram_bytes,
                machine=about.machine,
                used=about.used,
                unnamed=about.unnamed,
                files=files,
                record=dict(about.record or {}),
            )
            fd = os.open(MANIFEST, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=self.fd)
            with os.fdopen(fd, "wb") as file:
                file.write(manifest.encode(made))
                file.flush()
                os.fsync(fd)
            os.fsync(self.fd)
            self._publish(self.image_id)
        self._committed = True
        return made

    def _sum_all(self) -> dict[str, FileSum]:
        """Makes every file durable, and sums those that were not summed while they were written."""
        names = sorted(name for name in checksums.walk(self.fd) if not name.startswith(f"{KEPT}/"))
        sizes = {name: stat_at(self.fd, name).st_size for name in names}
        known = {n: s for n, s in self._sums.items() if sizes.get(n) == s.size_bytes}
        # The disk first: while it writes, there is something to sum.
        with ThreadPoolExecutor(4) as pool:
            synced = [pool.submit(fsync, self.fd, name) for name in names]
            files = known | checksums.sum_files(self.fd, [n for n in names if n not in known])
            for one in synced:
                one.result()
        for name in {os.path.dirname(n) for n in names} - {""}:  # noqa: PTH120
            fsync(self.fd, name)
        return files


class Image:
    """A complete image, open: also when it is deleted meanwhile. Close it, or use it as a context manager."""

    def __init__(self, root: Path, image_id: str, fd: int, about: Manifest) -> None:
        self.root, self.image_id, self.fd, self.manifest = root, image_id, fd, about

    @property
    def path(self) -> Path:
        return self.root / self.image_id

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open_criu(self) -> int:
        """CRIU's directory; the caller closes it."""
        return os.open(CRIU, DIRECTORY, dir_fd=self.fd)

    def verify(self) -> None:
        """Reads all of it from the disk and compares. Raises CriuError that says what is damaged."""
        self._verify(lambda: checksums.verify_files(self.fd, self.manifest.files, direct=True))

    @contextlib.contextmanager
    def verifying(self, progress: Callable[[], int] | None = None) -> Iterator[None]:
        """Around a restore: the small files are verified before it, the memory beside it, through the page cache.

        The disk is read once that way, since CRIU finds there what was just verified. ``progress``: how many bytes of
        memory were restored; then little of the page cache is used. At the end of the block the verdict is waited
        for, and CriuError is raised where something is damaged: so what was restored must still be stopped then, and
        is to be killed on that error.
        """
        large = {name: one for name, one in self.manifest.files.items() if "/pages-" in name}
        small = {n: s for n, s in self.manifest.files.items() if n not in large}
        self._verify(lambda: self._require_sizes(large))  # CRIU waits for ever for what is cut off
        self._verify(lambda: checksums.verify_files(self.fd, small, direct=False))
        stop, pace = threading.Event(), self._pace(large, progress)
        with ThreadPoolExecutor(1, "verify") as pool:
            verdict = pool.submit(
                checksums.verify_files, self.fd, large, direct=False, stop=stop, pace=pace
            )
            try:
                yield
            except BaseException:
                stop.set()
                raise
            finally:
                if pace is not None:
                    pace.end()
            self._verify(verdict.result)

    def _pace(
        self, large: Mapping[str, FileSum], progress: Callable[[], int] | None
    ) -> Pace | None:
        """Only where nearly all of the memory is in one file: how far each of several was read nobody knows."""
        sizes = {name: one.size_bytes for name, one in large.items()}
        if progress is None or not sizes or max(sizes.values()) < 0.9 * sum(sizes.values()):
            return None
        return Pace(max(sizes, key=lambda name: sizes[name]), progress)

    def restore_directory(self, part: str, directory: int) -> None:
        """Unpacks PART.tar into a directory that nobody else uses meanwhile. Raises CriuError, Unavailable."""
        name, flags = archive_name(part), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with understood(self.root):
            archive = os.open(name, flags, dir_fd=self.fd)
        try:
            unpack(archive, directory)
        finally:
            os.close(archive)

    def _require_sizes(self, files: Mapping[str, FileSum]) -> None:
        for name, one in files.items():
            size = stat_at(self.fd, name).st_size
            if size != one.size_bytes:
                raise Damaged(f"{name} has {size} bytes, not {one.size_bytes}")

    def _verify(self, verify: Callable[[], None]) -> None:
        try:
            verify()
        except (Damaged, OSError) as error:
            raise errors.CriuError(
                f"image {self.image_id} of {self.manifest.name} is damaged and cannot be brought back: {error}",
                {"image": self.image_id},
            ) from error
