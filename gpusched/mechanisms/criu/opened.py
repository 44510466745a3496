"""What restored processes hold must be what the saved ones held: checked before they run. Blocking; root only.

CRIU opens files by their paths, as root, for processes of users. Between the dump and the restore a user may have put
a symbolic link, or another file, in the place of one: then their process would have a file of root's open. What was
opened cannot change any more, so it is compared after the restore, while everything is stopped.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import system, unix_peers
from gpusched.mechanisms.criu.inside import Inside, Task
from gpusched.mechanisms.criu.manifest import Unnamed

_SHM: Final = "/dev/shm"  # noqa: S108
#: File systems of the kernel's whose files ask who opens them, or hold nothing.
_KERNELS: Final = ("/proc", "/sys")
_MEMORY_DEVICES: Final = 1  # major number of null, zero, random, ...
_HUGE: Final = ("/anon_hugepage", "/memfd:")


class _Held(NamedTuple):
    pid: int
    path: str
    about: os.stat_result

    @property
    def has_lost_its_name(self) -> bool:
        return self.path.endswith(" (deleted)")

    @property
    def is_nameless(self) -> bool:
        return self.about.st_nlink == 0

    @property
    def likeness(self) -> tuple[int, int, int, int]:
        about = self.about
        size = about.st_size if stat.S_ISREG(about.st_mode) else 0
        return about.st_uid, about.st_gid, about.st_mode, size

    def is_memory(self, device: int) -> bool:
        return self.about.st_dev == device or self.path.startswith(_HUGE)


def check(
    inside: Inside,
    tasks: Iterable[Task],
    allowed: Collection[tuple[int, int]],
    unnamed: Collection[Unnamed],
    name: str,
) -> None:
    """Raises CriuError when a process has a file open, mapped or as its directory that is not what it had.

    ``allowed``: (device, inode) of files that were compared with the manifest, and of those that were given anew.
    ``unnamed``: what ``unnamed_files`` found before. Beside those a process may have files in its tree's own
    /dev/shm, memory, and what is the kernel's.
    """
    own = _devices(inside, (_SHM, *_KERNELS))
    memory = _memory_device()
    for held in _held(tasks):
        about = held.about
        if (about.st_dev, about.st_ino) in allowed or about.st_dev in own:
            continue
        if held.is_nameless and (held.is_memory(memory) or held.likeness in unnamed):
            continue
        if stat.S_ISCHR(about.st_mode) and os.major(about.st_rdev) == _MEMORY_DEVICES:
            continue
        if held.has_lost_its_name and about.st_nlink and about.st_ino in unnamed:
            continue
        raise errors.CriuError(
            f"{name} came back with {held.path} open, which is not what it had; something was put in the place of a "
            "file of its, and it was ended before it ran",
            {"path": held.path, "pid": held.pid},
        )


def unnamed_files(tasks: Iterable[Task]) -> tuple[Unnamed, ...]:
    """What processes have open or mapped by a name that is gone; memory has none of its own and is left out."""
    memory = _memory_device()
    held = [one for one in _held(tasks) if one.has_lost_its_name]
    linked = {one.about.st_ino for one in held if not one.is_nameless}
    nameless = {one.likeness for one in held if one.is_nameless and not one.is_memory(memory)}
    return (*sorted(linked), *sorted(nameless))


def _memory_device() -> int:
    """Where the kernel has memfds, and memory that processes share."""
    fd = os.memfd_create("device")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def has_fixed_names(inside: Inside, tasks: Iterable[Task]) -> bool:
    """Whether a restore makes names where other restores of the same image would make the same ones.

    CRIU makes files without a name anew (and takes the name away again), beside where they were, and Unix sockets at
    their paths. What has its place in the tree's own /dev/shm, or never had one, is nobody else's.
    """
    own = _devices(inside, (_SHM,)) | {_memory_device()}
    tasks = list(tasks)
    if any(one.has_lost_its_name and one.about.st_dev not in own for one in _held(tasks)):
        return True
    try:
        sockets = unix_peers.read(inside.network_namespace)
    except OSError:
        return True
    named = {inode for inode, one in sockets.items() if one.name.startswith("/")}
    return any(inode in named for task in tasks for inode in _sockets(task.pid))


def _sockets(pid: int) -> Iterator[int]:
    """The inodes of a process's sockets."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            link = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115
            if link.startswith("socket:["):
                yield int(link[8:-1])


def _devices(inside: Inside, paths: Iterable[str]) -> set[int]:
    """The devices of file systems, each the root of its own."""
    found = set()
    root = os.fstat(inside.root).st_dev
    for path in paths:
        with contextlib.suppress(OSError):
            fd = inside.open(path, os.O_PATH | os.O_DIRECTORY)
            found.add(os.fstat(fd).st_dev)
            os.close(fd)
    return found - {root}


def _held(tasks: Iterable[Task]) -> Iterator[_Held]:
    """What has ended meanwhile holds nothing."""
    for task in tasks:
        try:
            yield from _held_by(task.pid)
        except (FileNotFoundError, ProcessLookupError):
            found = proc.read_stat(task.pid)
            if found is not None and found.start_ticks == task.start_ticks and found.is_alive:
                raise


def _held_by(pid: int) -> Iterator[_Held]:
    base = f"/proc/{pid}"
    names = [f"fd/{name}" for name in os.listdir(f"{base}/fd")]  # noqa: PTH208
    for name in (*names, "cwd", "root", "exe"):
        path = os.readlink(f"{base}/{name}")  # noqa: PTH115
        if path.startswith("/") and not (name == "root" and path == "/"):
            yield _Held(pid, path, os.stat(f"{base}/{name}"))  # noqa: PTH116
    seen = set()
    for line in Path(f"{base}/maps").read_bytes().splitlines():
        mapping = system.parse_mapping(line)
        if mapping is None or (identity := tuple(line.split(None, 5)[3:])) in seen:
            continue
        seen.add(identity)
        with contextlib.suppress(FileNotFoundError):  # a mapping of the kernel's own
            link = f"{base}/map_files/{mapping.range}"
            yield _Held(pid, mapping.path, os.stat(link))  # noqa: PTH116
