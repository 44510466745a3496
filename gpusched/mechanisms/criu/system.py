"""Reading what an image relies on: the machine, and the files that processes have mapped or open. Blocking."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from gpusched.mechanisms import proc
from gpusched.mechanisms.criu.inside import RESOLVE_NO_SYMLINKS, Inside, Task
from gpusched.mechanisms.criu.manifest import Gpu, Machine, Stamp, UsedFile
from gpusched.mechanisms.criu.program import Program
from gpusched.ports import Description
from gpusched.units import KIB

_ENDS_BYTES: Final = 64 * KIB
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
#: The tree's own, saved with the image.
PRIVATE: Final = "/dev/shm/"  # noqa: S108
_VIRTUAL: Final = ("/proc/", "/sys/", "/dev/", "/memfd:", "/SYSV", "/anon_hugepage")


class OpenFile(NamedTuple):
    """A file that a process has mapped (``fd`` is None), open, or as a directory (-1), by its path inside."""

    path: str
    pid: int
    fd: int | None
    writable: bool


def read_machine(program: Program, driver: Description | None = None) -> Machine:
    """``driver``: where GPU state is in the image, or is to come back. Blocks for milliseconds."""
    return Machine(
        boot_id=proc.boot_id(),
        kernel=platform.release(),
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo").read_text()),
        criu_version=program.version,
        driver_version=driver.driver_version if driver else "",
        gpus=tuple(Gpu(uuid=gpu.uuid, name=gpu.name) for gpu in driver.gpus) if driver else (),
    )


def _cpu_flags(text: str) -> tuple[str, ...]:
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return tuple(sorted(match[1].split())) if match else ()


# -- files ----------------------------------------------------------------------------------------


def used_files(inside: Inside, tasks: Iterable[Task]) -> list[UsedFile]:
    """What the processes have mapped or open outside of what is saved with them, each path once.

    Files without a name any more are in the image. Blocks for 0.1 ms a file.
    """
    mapped: dict[str, bool] = {}
    writable: dict[str, bool] = {}
    for one in open_files(tasks):
        mapped[one.path] = mapped.get(one.path, False) or one.fd is None
        writable[one.path] = writable.get(one.path, False) or one.writable
    found = []
    for path, seen in look(inside, mapped).items():
        if seen is not None:
            is_writable = writable[path] and stat.S_ISREG(seen.stamp.mode)
            found.append(
                UsedFile(path=path, stamp=seen.stamp, mapped=mapped[path], writable=is_writable)
            )
    return found


class Seen(NamedTuple):
    """A file or directory as it is now. ``identity`` is (device, inode)."""

    stamp: Stamp
    identity: tuple[int, int]


def look(inside: Inside | None, paths: Iterable[str]) -> dict[str, Seen | None]:
    """Files as the tree sees them now; None where there is none, or only through a symbolic link.

    Without a tree: as the host does, and so as fresh namespaces would. The paths came from the kernel, without links:
    what is reached through one is not what it was. Blocks for 0.1 ms a file.
    """
    found: dict[str, Seen | None] = {}
    for path in sorted(paths):
        found[path] = None
        with contextlib.suppress(OSError):
            found[path] = see(
                _open_here(path)
                if inside is None
                else inside.open(path, os.O_PATH | os.O_NOFOLLOW, resolve=RESOLVE_NO_SYMLINKS)
            )
    return found


def _open_here(path: str) -> int:
    if os.path.realpath(path) != path:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def see(path_fd: int) -> Seen | None:
    """None for what is neither a plain file nor a directory. Closes ``path_fd``, an O_PATH descriptor.

    The path is the user's: opening a device can be enough to make it act, so nothing is opened before it was seen.
    """
    try:
        about = os.fstat(path_fd)
        who = Stamp(mode=about.st_mode, uid=about.st_uid, gid=about.st_gid)
        identity = (about.st_dev, about.st_ino)
        if stat.S_ISDIR(about.st_mode):
            return Seen(who, identity)
        if not stat.S_ISREG(about.st_mode):
            return None
        fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(path_fd)
    try:
        first = os.pread(fd, _ENDS_BYTES, 0)
        last = os.pread(fd, _ENDS_BYTES, max(0, about.st_size - _ENDS_BYTES))
    finally:
        os.close(fd)
    made = msgspec.structs.replace(
        who,
        size_bytes=about.st_size,
        mtime_ns=about.st_mtime_ns,
        ends=hashlib.blake2b(first + last, digest_size=16).hexdigest(),
        elf=first.startswith(b"\x7fELF"),
    )
    return Seen(made, identity)


# -- what processes have --------------------------------------------------------------------------


def open_files(tasks: Iterable[Task]) -> Iterator[OpenFile]:
    """The named files and directories of the host that processes have mapped or open; what vanishes is left out."""
    for task in tasks:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{task.pid}/maps").read_bytes().splitlines():
                if (mapping := parse_mapping(line)) is not None and is_named(mapping.path):
                    yield OpenFile(mapping.path, task.pid, None, mapping.writable)
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{task.pid}/fd"):  # noqa: PTH208
                if (one := _descriptor(task.pid, name)) is not None:
                    yield one
        for link in ("cwd", "root"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/{task.pid}/{link}")  # noqa: PTH115
                if is_named(path):
                    yield OpenFile(path, task.pid, -1, False)


class Mapping(NamedTuple):
    """``range`` is the name below map_files; ``writable``: whether writes reach the file."""

    range: str
    path: str
    writable: bool


def parse_mapping(line: bytes) -> Mapping | None:
    """A line of /proc/PID/maps; None where it is no file."""
    fields = line.split(None, 5)
    if len(fields) < 6 or not fields[5].startswith(b"/"):
        return None
    path = os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), fields[5]))
    shared = fields[1][1:2] == b"w" and fields[1][3:4] == b"s"
    return Mapping(fields[0].decode(), path, shared)


def is_named(path: str) -> bool:
    """Whether it is a file of the host's that has a name: not a device, not the kernel's, not the tree's own."""
    virtual = path.startswith(_VIRTUAL) or path.endswith(" (deleted)")
    return path.startswith("/") and not virtual


def _descriptor(pid: int, name: str) -> OpenFile | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        path = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115
        if is_named(path):
            mode = os.stat(f"/proc/{pid}/fd/{name}").st_mode  # noqa: PTH116
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                text = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
                flags = int(text.split("flags:", 1)[1].split(None, 1)[0], 8)
                return OpenFile(path, pid, int(name), flags & os.O_ACCMODE != os.O_RDONLY)
    return None
