"""Reading the host side: the kernel's files, limits, directories, and who answers at the socket. Changes nothing."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Final

from gpusched import preload
from gpusched.client import GpuSched
from gpusched.doctor.readings import Daemon, Directory, Disk, Host, Subject
from gpusched.errors import GpuschedError
from gpusched.mechanisms import cgroups
from gpusched.mechanisms.host import ProcHost

DAEMON_TIMEOUT_S: Final = 3.0
#: The kernel gives its first pid namespace this inode (PROC_PID_INIT_INO).
_FIRST_PID_NAMESPACE: Final = "pid:[4026531836]"
_COMPILERS: Final = ("cc", "gcc", "clang")
_CONTAINER_GROUP: Final = re.compile(r"/(docker|kubepods|lxc|libpod|containerd|podman)[-./]")


def read() -> Host:
    """Reads small files of the kernel's alone: milliseconds."""
    proc = ProcHost()
    ram = proc.ram()
    group = cgroups.TreeGroups().path_for("x")
    memlock, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Host(
        python=f"{platform.python_version()} ({sys.executable})",
        kernel=platform.release(),
        euid=os.geteuid(),
        capabilities=_capabilities(),
        ram_total_bytes=ram.total_bytes,
        ram_available_bytes=ram.available_bytes,
        group_room_bytes=proc.cgroup_room_bytes(os.getpid()),
        huge_pages=parse_choice(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        ptrace_scope=_number("/proc/sys/kernel/yama/ptrace_scope"),
        cgroup=str(group.parent) if group else None,
        cgroup_writable=group is not None and os.access(group.parent, os.W_OK),
        compiler=next((path for name in _COMPILERS if (path := shutil.which(name))), None),
        library=preload.library(),
        clocksource=_text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        container=_container(),
        machine=_text("/sys/class/dmi/id/product_name") or _text("/sys/hypervisor/type"),
        virtual=" hypervisor" in (_text("/proc/cpuinfo") or ""),
        own_pid_namespace=_pid_namespace() not in {None, _FIRST_PID_NAMESPACE},
        shm_bytes=_size("/dev/shm"),  # noqa: S108 - measured, not written
    )


def read_disk(subject: Subject) -> Disk:
    """May block for ever on a file system whose server is gone: call it with a time limit."""
    return Disk(
        state=_directory(subject.state_dir),
        snapshots=_directory(subject.disk_dir or subject.state_dir),
    )


def read_daemon(subject: Subject) -> Daemon:
    """Blocks for at most some seconds."""
    socket = str(subject.socket_path)
    try:
        with GpuSched(socket, timeout_s=DAEMON_TIMEOUT_S) as client:
            status = client.status()
    except (GpuschedError, OSError) as error:
        missing = not subject.socket_path.exists()
        return Daemon(socket=socket, error="not running" if missing else str(error))
    return Daemon(
        socket=socket,
        version=status.get("version", ""),
        backend=status["capabilities"].get("backend", ""),
        pid=status.get("pid", 0),
    )


def parse_choice(text: str | None) -> str | None:
    """``"always [madvise] never"`` -> ``"madvise"``."""
    match = re.search(r"\[(\w+)\]", text or "")
    return match[1] if match else None


def _capabilities() -> int:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _text("/proc/self/status") or "", re.MULTILINE)
    return int(match[1], 16) if match else 0


def _container() -> str | None:
    """What kind of container we are in, by the marks that each kind leaves."""
    for mark, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if Path(mark).exists():
            return kind
    if said := _text("/run/systemd/container"):
        return said
    for entry in (_text("/proc/1/environ") or "").split("\0"):
        if entry.startswith("container=") and len(entry) > len("container="):
            return entry.removeprefix("container=")
    match = _CONTAINER_GROUP.search(_text("/proc/1/cgroup") or "")
    return match[1] if match else None


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _directory(path: Path) -> Directory:
    """The directory, or the nearest one above it, in which it would be made."""
    found = path
    while not found.exists() and found != found.parent:
        found = found.parent
    return Directory(
        path=str(path),
        writable=found.is_dir() and os.access(found, os.W_OK | os.X_OK),
        free_bytes=shutil.disk_usage(found).free,
    )


def _size(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return None


def _text(path: str) -> str | None:
    """None where it cannot be read: not there, or not for this user."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdecimal() else None
