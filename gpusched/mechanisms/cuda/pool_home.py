"""Where the pool lies.

A root daemon gets a tmpfs of its own, with huge pages where the system allows them: those are made and registered
several times as fast. Others, and who may not mount, use the host's shared memory.
"""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import zlib
from pathlib import Path
from typing import Final

from gpusched import errors
from gpusched.mechanisms import proc

log = logging.getLogger(__name__)

_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_SHM: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own in it, which is checked
_libc = ctypes.CDLL(None, use_errno=True)


def place(state_dir: Path) -> Path:
    """Where ``prepare`` has put it, or will."""
    own = state_dir / "pool"
    if own.is_mount():
        return own
    tag = f"{zlib.crc32(os.fsencode(state_dir.resolve())):08x}"
    return _SHM / f"gpusched-pool-{os.geteuid()}-{tag}"


def prepare(state_dir: Path) -> Path:
    """Makes it, or finds what the last daemon made. Raises Unavailable where somebody else's is in its place."""
    own = state_dir / "pool"
    if os.geteuid() == 0 and not own.is_mount():
        own.mkdir(mode=0o700, exist_ok=True)
        if not any(_mount(own, options) for options in ("huge=advise,", "")):
            log.info("no memory file system of its own for the pool; using %s", _SHM)
    path = place(state_dir)
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise errors.Unavailable(f"{path} is not a directory of uid {os.geteuid()}; remove it")
    path.chmod(0o700)
    return path


def _mount(path: Path, options: str) -> bool:
    data = f"{options}size=100%,mode=0700".encode()
    result = _libc.mount(b"gpusched", os.fsencode(path), b"tmpfs", _NOSUID_NODEV_NOEXEC, data)
    return bool(result == 0)


def release(state_dir: Path) -> None:
    """Takes the file system away again where nothing is in the pool. Never raises."""
    own = state_dir / "pool"
    if not own.is_mount():
        return
    for path in own.glob("process-*.json"):
        pid, ticks = map(int, path.stem.split("-")[1:])
        found = proc.read_stat(pid)
        if found is not None and found.start_ticks == ticks:
            return
    _libc.umount2(os.fsencode(own), 0)


def in_use(state_dir: Path) -> Path | None:
    """A pool of this user's that holds something, that of ``state_dir`` before others; None where there is none."""
    others = sorted(_SHM.glob(f"gpusched-pool-{os.geteuid()}-*"))
    for path in (place(state_dir), *others):
        try:
            is_ours = path.lstat().st_uid == os.geteuid() and not path.is_symlink()
        except OSError:
            continue
        if is_ours and any(path.glob("process-*.json")):
            return path
    return None
