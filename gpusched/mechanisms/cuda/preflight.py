"""What must not be checkpointed, told from /proc and NVML before anything is touched.

Covers: reading a process's signs from /proc, parsing them, and judging them into obstacles. Does not cover: the
driver's calls (``driver.py``), nor room in VRAM, RAM or a cgroup (the engine's part).
See also: docs/decisions/0012-what-is-refused-before-a-checkpoint.md, for where each sign comes from.

An obstacle is ``certain`` only where the kernel or NVML says the fact itself; what is inferred from a sign is not,
and may be forced. Runs at every freeze, so a thing is read only when it can still change the answer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gpusched.ports import Obstacle

_DEVICES: Final = "/dev/nvidia"
#: One for each part of a GPU in MIG mode. The first two are NVML's, for setting MIG up, and open anywhere.
_CAPABILITY: Final = "/dev/nvidia-caps/nvidia-cap"
_NVML_CAPABILITIES: Final = frozenset({f"{_CAPABILITY}1", f"{_CAPABILITY}2"})
#: Only CUDA opens it. NVML, which most PyTorch programs open too, keeps the other devices through a checkpoint.
_UVM: Final = "/dev/nvidia-uvm"
_SEGMENT: Final = "/dev/shm/cuda.shm."  # noqa: S108 - the driver's own name, only ever compared
_UVM_LINE_END: Final = b" /dev/nvidia-uvm\n"
_NCCL_SEGMENT: Final = b" /dev/shm/nccl-"
#: Abstract: NCCL puts a zero byte, which the kernel shows as "@", over the first character of /tmp/...
_NCCL_SOCKET: Final = b"@tmp/nccl-socket-"
_MPS_DIRECTORY: Final = "/tmp/nvidia-mps"  # noqa: S108 - where MPS listens when nothing else is said
_MPS_PID_FILE: Final = "nvidia-cuda-mps-control.pid"
_STOPPED: Final = frozenset({"T", "t"})
_MAX_FILE_BYTES: Final = 256 * 1024 * 1024

_NCCL_WAY_OUT: Final = (
    "destroy the communicators first (torch.distributed.destroy_process_group), or start it with "
    "NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0"
)


class Node(Protocol):
    """What NVML knows. Asked only when a sign makes the answer matter."""

    def mig_pids(self) -> Collection[int]:
        """Processes on GPUs that are in MIG mode."""
        ...

    def mps_pids(self) -> Collection[int] | None:
        """Clients of MPS; None when NVML cannot tell."""
        ...

    def cuda_pids(self) -> Mapping[int, int]:
        """Every process with a CUDA context -> on how many GPUs."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What the descriptors of a process point to, as far as it matters here."""

    holds_gpu: bool  # by CUDA or by NVML
    holds_uvm: bool  # by CUDA, and not checkpointed
    segments: frozenset[
        str
    ]  # the driver's shared memory, made when an event is exported by legacy IPC, as PyTorch does
    sockets: frozenset[bytes]  # inodes
    holds_mig: bool  # a capability for a part of a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """Everything that was seen of one process that holds a GPU."""

    pid: int
    stopped: bool
    uvm_mappings: int
    holds_mig: bool
    nccl: str | None  # the sign of NCCL that was found, in words
    environ: Mapping[str, str]
    own_segments: frozenset[str]
    foreign_segments: frozenset[str]
    mps_daemon: bool  # a control daemon runs where this process would look for one


# -- parsing: pure --------------------------------------------------------------------------------


def parse_links(targets: Iterable[str]) -> Links:
    """The targets of /proc/PID/fd/*."""
    holds_gpu = holds_uvm = holds_mig = False
    segments, sockets = set[str](), set[bytes]()
    for target in targets:
        if target.startswith("socket:["):
            sockets.add(target[8:-1].encode())
        elif target.startswith(_SEGMENT):
            segments.add(target.removesuffix(" (deleted)"))
        elif target.startswith(_DEVICES):
            holds_gpu = True
            holds_uvm |= target == _UVM
            holds_mig |= target.startswith(_CAPABILITY) and target not in _NVML_CAPABILITIES
    return Links(
        holds_gpu=holds_gpu,
        holds_uvm=holds_uvm,
        segments=frozenset(segments),
        sockets=frozenset(sockets),
        holds_mig=holds_mig,
    )


def parse_segments(maps: bytes) -> frozenset[str]:
    """The driver's shared memory in /proc/PID/maps. The exporter holds a descriptor too, an importer only this."""
    if _SEGMENT.encode() not in maps:
        return frozenset()
    names = (line[line.index(b"/") :] for line in maps.splitlines() if b" /dev/shm/" in line)
    paths = (os.fsdecode(name).removesuffix(" (deleted)") for name in names)
    return frozenset(path for path in paths if path.startswith(_SEGMENT))


def parse_environ(data: bytes) -> dict[str, str]:
    """/proc/PID/environ: the variables at the start of the program; later ``setenv`` calls are not in it."""
    pairs = (item.partition(b"=") for item in data.split(b"\0") if b"=" in item)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def parse_state(stat: bytes) -> str:
    """The one-letter state in /proc/PID/stat. The command's name before it may contain anything."""
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3].decode()


def parse_ns_pids(status: bytes) -> frozenset[int]:
    """The pids of a process in all its pid namespaces, from /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith(b"NSpid:"):
            return frozenset(int(word) for word in line.split()[1:])
    return frozenset()


def nccl_socket(unix: bytes, inodes: Collection[bytes]) -> str | None:
    """The name of the first socket of an NCCL communicator in /proc/PID/net/unix that is among ``inodes``."""
    if _NCCL_SOCKET not in unix:
        return None
    for line in unix.splitlines():
        words = line.split(maxsplit=7)
        if len(words) == 8 and _NCCL_SOCKET in words[7] and words[6] in inodes:
            return os.fsdecode(words[7]).rstrip("@")  # the rest of the address: zero bytes
    return None


def segment_pid(segment: str) -> int | None:
    """The exporter in ``/dev/shm/cuda.shm.UID.PID.NUMBER`` (hexadecimal); None for a name of another form."""
    words = segment.removeprefix(_SEGMENT).split(".")
    try:
        return int(words[1], 16)
    except (IndexError, ValueError):
        return None


def nccl_is_safe(environ: Mapping[str, str]) -> bool:
    """Whether the variables keep NCCL off everything that a restore cannot bring back.

    There are two such settings: neither P2P nor cuMem; or, with cuMem, neither P2P nor shared memory nor NVLS.
    """

    def is_on(name: str) -> bool:
        return environ.get(name, "").strip() not in {"", "0"}

    def is_off(name: str) -> bool:
        return environ.get(name, "").strip() == "0"

    if not is_on("NCCL_P2P_DISABLE"):
        return False
    return is_off("NCCL_CUMEM_ENABLE") or (is_on("NCCL_SHM_DISABLE") and is_off("NCCL_NVLS_ENABLE"))


# -- reading: /proc, no decisions -----------------------------------------------------------------


def _read(path: str) -> bytes:
    """The whole of a kernel file, but for one that a hostile process made endless. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts, size = list[bytes](), 0
        while part := os.read(fd, 1 << 20):
            parts.append(part)
            size += len(part)
            if size > _MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, f"{path} is longer than that of any honest process")
        return b"".join(parts)
    finally:
        os.close(fd)


def read_state(pid: int) -> str | None:
    """The state letter of a process ("T": stopped, "Z": zombie); None when there is none."""
    try:
        return parse_state(_read(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger keeps the process stopped: then no call of the driver on it comes back."""
    return read_state(pid) in _STOPPED


def read_links(pid: int) -> Links:
    """Raises OSError: gone (FileNotFoundError, ProcessLookupError) or not ours to read (PermissionError)."""
    directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        targets = []
        for name in os.listdir(directory):  # noqa: PTH208 - a descriptor, not a path
            try:
                targets.append(os.readlink(name, dir_fd=directory))
            except FileNotFoundError:
                continue  # closed meanwhile
        return parse_links(targets)
    finally:
        os.close(directory)


def _read_comm(task: str, directory: int) -> bytes:
    """The name of one thread; empty when it has ended. One read is enough: names have 15 bytes."""
    try:
        fd = os.open(f"{task}/comm", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return b""
    try:
        return os.read(fd, 64)
    except ProcessLookupError:
        return b""
    finally:
        os.close(fd)


def has_thread(pid: int, prefixes: tuple[bytes, ...]) -> str | None:
    """The name of the first thread that starts with one of ``prefixes``. Raises OSError like ``read_links``."""
    directory = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for task in os.listdir(directory):  # noqa: PTH208 - a descriptor, not a path
            comm = _read_comm(task, directory)
            if comm.startswith(prefixes):
                return os.fsdecode(comm.rstrip(b"\n"))
        return None
    finally:
        os.close(directory)


def _read_nccl(pid: int, links: Links, maps: bytes) -> str | None:
    """The sign of a live communicator. A process group that has none yet, or has destroyed it, is harmless."""
    if not links.sockets:
        return None
    if name := nccl_socket(_read(f"/proc/{pid}/net/unix"), links.sockets):
        return f"the socket {name}"
    # NCCL before 2.18 has no such socket, and shares memory by legacy IPC and these files.
    return "a mapping of /dev/shm/nccl-*" if _NCCL_SEGMENT in maps else None


def read_signs(pid: int, links: Links) -> Signs:
    """Raises OSError like ``read_links``."""
    maps = _read(f"/proc/{pid}/maps")
    environ = parse_environ(_read(f"/proc/{pid}/environ"))
    own = foreign = frozenset[str]()
    if segments := links.segments | parse_segments(maps):
        pids = parse_ns_pids(_read(f"/proc/{pid}/status"))
        own = frozenset(name for name in segments if segment_pid(name) in pids)
        foreign = segments - own
    mps = environ.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS_DIRECTORY
    return Signs(
        pid=pid,
        stopped=is_stopped(pid),
        uvm_mappings=maps.count(_UVM_LINE_END),
        holds_mig=links.holds_mig,
        nccl=_read_nccl(pid, links, maps),
        environ=environ,
        own_segments=own,
        foreign_segments=foreign,
        # The daemon removes this file when it ends; its sockets stay behind.
        mps_daemon=os.path.exists(f"/proc/{pid}/root/{mps.lstrip('/')}/{_MPS_PID_FILE}"),  # noqa: PTH110
    )


# -- judging: pure but for the questions to NVML --------------------------------------------------


def judge(signs: Signs, node: Node) -> list[Obstacle]:
    """The obstacles of one process by itself; what several share is ``judge_sharing``'s."""
    pid, found = signs.pid, list[Obstacle]()

    def refuse(kind: str, message: str, *, certain: bool) -> None:
        found.append(Obstacle(pid=pid, kind=kind, message=message, certain=certain))

    if signs.stopped:
        refuse(
            "stopped",
            f"process {pid} is stopped, and the driver needs its threads; continue it first: kill -CONT {pid}",
            certain=True,
        )
    if signs.holds_mig and pid in node.mig_pids():
        refuse(
            "mig",
            f"process {pid} runs on a GPU in MIG mode, which the driver cannot checkpoint; "
            "run it on a GPU without MIG",
            certain=True,
        )
    if signs.mps_daemon:
        clients = node.mps_pids()
        if clients is None or pid in clients:
            refuse(
                "mps",
                f"process {pid} {'may be' if clients is None else 'is'} a client of MPS, which the driver cannot "
                "checkpoint; start it where no MPS daemon runs (CUDA_MPS_PIPE_DIRECTORY= an empty directory)",
                certain=clients is not None,
            )
    if signs.uvm_mappings > 1 and signs.uvm_mappings > (gpus := node.cuda_pids().get(pid, 1)):
        refuse(
            "managed_memory",
            f"process {pid} seems to use managed memory ({signs.uvm_mappings} mappings of nvidia-uvm with "
            f"{gpus} GPU): the driver refuses to checkpoint that, and some drivers end the process for it; "
            "allocate with cudaMalloc instead",
            certain=False,
        )
    if signs.nccl is not None and not nccl_is_safe(signs.environ):
        refuse(
            "nccl_p2p",
            f"process {pid} uses NCCL ({signs.nccl}), perhaps peer to peer: it would checkpoint but not come "
            f"back; {_NCCL_WAY_OUT}",
            certain=False,
        )
    return found


def judge_sharing(
    members: Sequence[Signs], holders: Mapping[str, Collection[int]]
) -> list[Obstacle]:
    """Memory shared by legacy CUDA IPC. ``holders``: segment -> processes outside ``members`` that hold it.

    Memory that nobody opened is harmless. There are three cases where somebody may have:
    1. a member holds the segment of another process: it imported memory;
    2. a member exported and another process holds that segment;
    3. a member exported and the tree has further CUDA processes: an import need not leave a sign.
    """
    found = []
    for signs in members:
        outside = {pid for name in signs.own_segments for pid in holders.get(name, ())}
        if signs.foreign_segments:
            what = "holds GPU memory that another process shares with it by CUDA IPC"
        elif outside:
            what = f"shares GPU memory by CUDA IPC with process {min(outside)}"
        elif signs.own_segments and len(members) > 1:
            what = "shares GPU memory by CUDA IPC, perhaps with another process of its tree"
        else:
            continue
        message = (
            f"process {signs.pid} {what}: it would checkpoint but not come back; close the shared memory first "
            "(in PyTorch: drop the shared tensors in every process, then torch.cuda.ipc_collect())"
        )
        found.append(Obstacle(pid=signs.pid, kind="ipc", message=message, certain=False))
    return found


def _holders(
    segments: Collection[str], members: Collection[int], node: Node
) -> dict[str, set[int]]:
    """Which other CUDA processes hold ``segments``; those that cannot be read are passed over."""
    found: dict[str, set[int]] = {}
    for pid in node.cuda_pids() if segments else ():
        if pid in members:
            continue
        try:
            held = read_links(pid).segments | parse_segments(_read(f"/proc/{pid}/maps"))
        except OSError:
            continue
        for name in held & frozenset(segments):
            found.setdefault(name, set()).add(pid)
    return found


def find_obstacles(pids: Sequence[int], node: Node) -> list[Obstacle]:
    """The obstacles of one tree. Blocks for about 2 ms a process; never raises for a process that is gone.

    A process that holds no GPU (it has no CUDA state, or is checkpointed already) has none.
    """
    members, found = list[Signs](), list[Obstacle]()
    for pid in pids:
        try:
            links = read_links(pid)
            if links.holds_gpu:
                members.append(read_signs(pid, links))
        except PermissionError:
            message = f"process {pid} may not be examined by this user; run the daemon as root"
            found.append(Obstacle(pid=pid, kind="unreadable", message=message, certain=False))
        except OSError:
            continue
    for signs in members:
        found += judge(signs, node)
    exported = frozenset(name for signs in members for name in signs.own_segments)
    return found + judge_sharing(members, _holders(exported, pids, node))
