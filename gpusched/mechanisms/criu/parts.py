"""What images and their store have in common: names, files by descriptor, directories as archives, the disk's errors.

Blocking. Nothing here follows a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gpusched import errors
from gpusched.mechanisms.criu import manifest
from gpusched.mechanisms.criu.manifest import Manifest, Unreadable
from gpusched.units import format_size

MANIFEST: Final = "manifest"
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PART: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_TAR_TIMEOUT_S: Final = 3600.0


def read_manifest(fd: int, image_id: str) -> Manifest:
    """Raises Unreadable."""
    try:
        with os.fdopen(os.open(MANIFEST, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd), "rb") as file:
            found = manifest.decode(file.read(manifest.MAX_BYTES))
    except OSError as error:
        raise Unreadable(f"its manifest cannot be read: {error.strerror}") from error
    if found.image_id != image_id:
        raise Unreadable(f"its manifest is that of {found.image_id}")
    return found


def stat_at(directory: int, name: str) -> os.stat_result:
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def exists(directory: int, name: str) -> bool:
    try:
        stat_at(directory, name)
    except FileNotFoundError:
        return False
    return True


def fsync(directory: int, name: str) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_bytes(directory: int) -> int:
    """What the files below take."""
    total = 0
    for _, _, names, fd in os.fwalk(".", dir_fd=directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                about = stat_at(fd, name)
                if stat.S_ISREG(about.st_mode):
                    total += about.st_blocks * 512
    return total


# -- directories as archives ----------------------------------------------------------------------


def archive_name(part: str) -> str:
    if not _PART.fullmatch(part):
        raise errors.InvalidRequest(f"{part!r} cannot be the name of a part of an image")
    return f"{part}.tar"


def pack(directory: int, out: int) -> None:
    """Writes a directory as a tar archive; what is mounted below it is left out. Raises CriuError, Unavailable.

    The program opens nothing through a symbolic link, and keeps holes, owners and modes.
    """
    _tar(["--create", "--sparse", "--one-file-system"], directory, ["."], stdout=out)


def unpack(archive: int, directory: int) -> None:
    """Into a directory that nobody else uses meanwhile. Raises CriuError, Unavailable."""
    _tar(["--extract", "--preserve-permissions", "--same-owner"], directory, [], stdin=archive)


def _tar(options: list[str], directory: int, names: list[str], **streams: int) -> None:
    where = ["--numeric-owner", "--file=-", f"--directory=/proc/self/fd/{directory}"]
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **streams}
    try:
        done = subprocess.run(
            ["tar", *options, *where, *names],
            stderr=subprocess.PIPE,
            pass_fds=(directory,),
            timeout=_TAR_TIMEOUT_S,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            **given,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise errors.Unavailable(f"tar cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise errors.CriuError(
            f"an archive could not be {'written' if names else 'unpacked'}: "
            f"{(said or ['tar did not say why'])[0]}"
        )


# -- the disk's errors ----------------------------------------------------------------------------


@contextlib.contextmanager
def understood(root: Path) -> Iterator[None]:
    """Turns the disk's errors into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise full(root) from error
        raise errors.Unavailable(
            f"the directory of images {root}: {error.strerror or error}; see to it, or choose another with --disk-dir"
        ) from error


def full(root: Path) -> errors.InsufficientDisk:
    about = os.statvfs(root)
    free = about.f_bavail * about.f_frsize
    return errors.InsufficientDisk(
        f"{root} is full ({format_size(free)} free): free some, or choose another with --disk-dir",
        {"free_bytes": free},
    )
