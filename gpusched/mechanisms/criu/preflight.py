"""What makes a tree impossible to save, told from /proc before anything is touched.

Covers: reading what processes hold, and judging it into obstacles with the words for a person. Does not cover: GPU
state (``cuda/preflight.py``), room on the disk. Blocking, for a millisecond a process. What CRIU could still stumble
over has its words in ``complaint.py``.

Certain obstacles are those where CRIU was seen to fail, always. The others may be forced: a dump that fails leaves
the processes as they were.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpusched import errors
from gpusched.mechanisms.criu import system, unix_peers
from gpusched.mechanisms.criu.inside import Inside, Task
from gpusched.mechanisms.criu.run import GHOST_LIMIT_BYTES, MAIN_PID
from gpusched.mechanisms.criu.unix_peers import UnixSocket
from gpusched.ports import Obstacle
from gpusched.units import format_size

#: Descriptors without a file that CRIU 4.2 saves; what is not here it does not.
_SAVED_KINDS: Final = frozenset(
    {"eventfd", "eventpoll", "signalfd", "inotify", "fanotify", "timerfd", "pidfd", "bpf-map"}
)
_IO_URING: Final = "io_uring"
_MEMORY_DEVICES: Final = 1  # major number of null, zero, random, ...
_PTY: Final = range(136, 144)
_NVIDIA: Final = "/dev/nvidia"
_ANON: Final = re.compile(r"anon_inode:\[?([^\]]+)\]?")
_NAMESPACES: Final = ("pid", "mnt", "net", "user", "ipc", "uts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """An open descriptor. ``link`` is what /proc/PID/fd says; ``device`` is (kind, major, minor) of a device node."""

    fd: int
    link: str
    device: tuple[str, int, int] | None = None
    size_bytes: int = 0  # of a file without a name, what it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one process holds, as far as it matters here."""

    pid: int
    tracer: int = 0
    tracer_name: str = ""
    descriptors: Sequence[Descriptor] = ()
    mappings: Collection[str] = ()  # paths of what is mapped
    foreign_namespaces: Collection[str] = ()  # kinds that differ from the tree's


def obstacles(
    inside: Inside, name: str, *, gpu_released: bool, main_pid: int = MAIN_PID
) -> list[Obstacle]:
    """Why the tree cannot be saved; empty when nothing is known against it. Touches nothing.

    ``gpu_released``: its GPU state was checkpointed already, so that no device of the driver's may be open any more.
    """
    tasks = inside.tasks()
    namespaces = _namespaces(inside.init.pid)
    held = [read(task.pid, namespaces) for task in tasks]
    sockets: Mapping[int, UnixSocket] = {}
    with contextlib.suppress(OSError):  # CRIU will tell
        sockets = unix_peers.read(inside.network_namespace)
    found = [one for h in held for one in judge(h, name, gpu_released=gpu_released)]
    found += judge_sockets(held, sockets, name)
    found += judge_orphans(inside.init.pid, tasks, name, main_pid)
    return found


def require_none(found: Iterable[Obstacle], name: str) -> None:
    """Raises Unsupported for what is certain: CRIU would fail, or lose it."""
    for one in found:
        if one.certain:
            raise errors.Unsupported(
                f"{name} cannot be saved to disk: {one.message}",
                {"pid": one.pid, "kind": one.kind, "certain": True},
            )


def writable_files(tasks: Iterable[Task], ignored: Collection[str] = ()) -> list[str]:
    """The plain files that the processes can write to; a copy of the processes would write to the same ones."""
    paths = {one.path for one in system.open_files(tasks) if one.writable}
    return sorted(paths - set(ignored))


def image_bytes(tasks: Iterable[Task]) -> int:
    """About what an image of the processes will take, at most: their memory that no file holds, and 5 %.

    Shared memory is counted for each process that has it. Files in /dev/shm: see ``shm_bytes``.
    """
    total = 0
    for task in tasks:
        with contextlib.suppress(OSError, ValueError):
            text = Path(f"/proc/{task.pid}/status").read_text()
            for field in ("RssAnon", "RssShmem", "VmSwap"):
                if match := re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE):
                    total += int(match[1]) * 1024
    return total + total // 20


def shm_bytes(inside: Inside) -> int:
    """What the tree's own /dev/shm holds, whether anybody has it mapped or not."""
    with contextlib.suppress(OSError):
        fd = inside.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY)  # noqa: S108
        try:
            about = os.fstatvfs(fd)
            if os.fstat(fd).st_dev != os.fstat(inside.root).st_dev:
                return (about.f_blocks - about.f_bfree) * about.f_frsize
        finally:
            os.close(fd)
    return 0


# -- judging: pure --------------------------------------------------------------------------------


def judge(held: Held, name: str, *, gpu_released: bool) -> list[Obstacle]:
    """What one process holds that cannot be saved."""
    found: dict[str, Obstacle] = {}

    def add(kind: str, message: str, *, certain: bool = True, once: str = "") -> None:
        one = Obstacle(pid=held.pid, kind=kind, message=message, certain=certain)
        found.setdefault(once or kind + message, one)

    if held.tracer:
        by = f" ({held.tracer_name})" if held.tracer_name else ""
        add("traced", f"{name} is traced by process {held.tracer}{by}; end that first")
    for one in held.descriptors:
        if (obstacle := _judge_descriptor(one, name, gpu_released)) is not None:
            add(*obstacle, once=obstacle[0] if obstacle[0] == _IO_URING else "")
    for path in held.mappings:
        if path.startswith("/SYSV"):
            add("sysv_shm", f"{name} uses System V shared memory, which cannot be saved to disk")
        elif path.startswith(f"anon_inode:[{_IO_URING}]"):
            add(_IO_URING, f"{name} uses io_uring, which cannot be saved to disk", once=_IO_URING)
        elif path.startswith("/dev/") and not path.startswith(("/dev/shm/", "/dev/zero")):  # noqa: S108
            if path.startswith(_NVIDIA) and not gpu_released:
                continue
            add("device", f"{name} has {path} mapped{_device_hint(path)}")
    if held.foreign_namespaces:
        kinds = ", ".join(sorted(held.foreign_namespaces))
        message = f"process {held.pid} of {name} has namespaces of its own ({kinds}) inside those of its tree"
        add("namespaces", message, certain=False)
    return list(found.values())


def _judge_descriptor(one: Descriptor, name: str, gpu_released: bool) -> tuple[str, str] | None:
    """(kind, message) of what cannot be saved."""
    if match := _ANON.fullmatch(one.link):
        kind = match[1].strip("[]")
        if kind == _IO_URING:
            return _IO_URING, (
                f"{name} uses io_uring (fd {one.fd}), which cannot be saved to disk; start it without "
                "(PyTorch's distributed store: UV_USE_IO_URING=0)"
            )
        if kind not in _SAVED_KINDS:
            return "descriptor", f"{name} has an open {kind} (fd {one.fd}) that cannot be saved"
    elif one.link.startswith("/dmabuf:"):
        return "descriptor", f"{name} has an open dmabuf (fd {one.fd}) that cannot be saved"
    elif one.device is not None:
        return _judge_device(one, name, gpu_released)
    elif one.size_bytes > GHOST_LIMIT_BYTES:
        return "deleted_file", (
            f"{name} has a deleted file of {format_size(one.size_bytes)} open (fd {one.fd}); "
            f"at most {format_size(GHOST_LIMIT_BYTES)} can be saved"
        )
    return None


def _judge_device(one: Descriptor, name: str, gpu_released: bool) -> tuple[str, str] | None:
    assert one.device is not None
    kind, major, minor = one.device
    if kind == "chr" and major == _MEMORY_DEVICES:
        return None
    if one.link.startswith(_NVIDIA) and not gpu_released:
        return None
    if kind == "chr" and major in _PTY:
        return "terminal", (
            f"{name} is attached to the terminal {one.link} (fd {one.fd}); start it without one"
        )
    what = f"{one.link} is still open in {name} (fd {one.fd}, {kind} {major}:{minor})"
    return "device", what + _device_hint(one.link)


def _device_hint(path: str) -> str:
    if path.startswith(_NVIDIA):
        return ": its GPU state was not released"
    return ": what a device holds cannot be saved"


def judge_sockets(
    held: Sequence[Held], sockets: Mapping[int, UnixSocket], name: str
) -> list[Obstacle]:
    """Unix sockets of the tree whose other end is outside of it."""
    own = {
        int(one.link[8:-1]): (h.pid, one.fd)
        for h in held
        for one in h.descriptors
        if one.link.startswith("socket:[")
    }
    found = []
    for inode, (pid, fd) in own.items():
        peer = sockets[inode].peer if inode in sockets else None
        if not peer or peer in own:
            continue
        where = (sockets[peer].name if peer in sockets else "") or sockets[inode].name
        to = where or "another program through an unnamed socket"
        message = f"{name} is connected to {to} (Unix socket, fd {fd}); close it first"
        found.append(Obstacle(pid=pid, kind="unix_peer", message=message))
    return found


def judge_orphans(init: int, tasks: Sequence[Task], name: str, main_pid: int) -> list[Obstacle]:
    """Processes that are not below the main one: they would not be in the image, and so be lost."""
    parents = {task.pid: task.parent for task in tasks}
    found = []
    for task in tasks:
        if task.parent == init and task.inner_pid != main_pid:
            below = sum(parent == task.pid for parent in parents.values())
            more = f" and {below} below it" if below else ""
            who = f"process {task.pid}{more} of {name}"
            message = f"{who} has left its parents (a daemon?) and cannot be saved; end it first"
            found.append(Obstacle(pid=task.pid, kind="orphan", message=message))
    if all(task.inner_pid != main_pid for task in tasks):
        message = f"the main process of {name} has ended; what is left of it cannot be saved"
        found.append(Obstacle(pid=init, kind="orphan", message=message))
    return found


# -- reading --------------------------------------------------------------------------------------


def read(pid: int, namespaces: Mapping[str, int]) -> Held:
    """What a process holds; what has ended holds nothing. ``namespaces``: kind -> inode, those of the tree."""
    tracer = 0
    with contextlib.suppress(OSError, AttributeError):
        status = Path(f"/proc/{pid}/status").read_text()
        match = re.search(r"^TracerPid:\s+(\d+)", status, re.MULTILINE)
        tracer = int(match[1]) if match else 0
    own = _namespaces(pid)
    return Held(
        pid=pid,
        tracer=tracer,
        tracer_name=_comm(tracer) if tracer else "",
        descriptors=_descriptors(pid),
        mappings=_mappings(pid),
        foreign_namespaces=[kind for kind, inode in own.items() if namespaces.get(kind) != inode],
    )


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _namespaces(pid: int) -> dict[str, int]:
    found = {}
    for kind in _NAMESPACES:
        with contextlib.suppress(OSError):
            found[kind] = os.stat(f"/proc/{pid}/ns/{kind}").st_ino  # noqa: PTH116
    return found


def _descriptors(pid: int) -> list[Descriptor]:
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                found.append(_descriptor(f"/proc/{pid}/fd/{name}", int(name)))
    return found


def _descriptor(path: str, fd: int) -> Descriptor:
    link = os.readlink(path)  # noqa: PTH115
    if not link.startswith("/"):
        return Descriptor(fd=fd, link=link)
    about = os.stat(path)  # noqa: PTH116
    device = None
    if stat.S_ISCHR(about.st_mode) or stat.S_ISBLK(about.st_mode):
        kind = "chr" if stat.S_ISCHR(about.st_mode) else "blk"
        device = (kind, os.major(about.st_rdev), os.minor(about.st_rdev))
    is_ghost = (
        about.st_nlink == 0 and stat.S_ISREG(about.st_mode) and not link.startswith("/memfd:")
    )
    size = about.st_blocks * 512 if is_ghost else 0
    return Descriptor(fd=fd, link=link, device=device, size_bytes=size)


def _mappings(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            fields = line.split(None, 5)
            if len(fields) == 6:
                found.add(os.fsdecode(fields[5]))
    return found
