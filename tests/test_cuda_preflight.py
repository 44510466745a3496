"""What is refused before a checkpoint: parsing, reading and judging, on processes that show the signs for real.

No GPU is needed: sockets, threads, mappings and shared memory are made under the names that NCCL and the driver use.
The texts below are in the kernel's form, shortened from what benchmarks/results/checkpoint_signature-*.json recorded on
two GPUs (plain, managed, peer, IPC and NCCL processes).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gpusched.mechanisms.cuda import preflight
from gpusched.mechanisms.cuda.preflight import Signs

LINKS_PLAIN = [
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/dev/nvidia0",
    "/dev/null",
    "socket:[7001]",
    "pipe:[88]",
]
MAPS_PLAIN = b"""\
200000000-200200000 ---p 00000000 00:00 0
200200000-200400000 rw-s 00000000 00:06 412                              /dev/nvidiactl
7f00a0000000-7f00a0200000 rw-s 00000000 00:06 420                        /dev/nvidia-uvm
7f00b0000000-7f00b0001000 r-xp 00000000 fe:00 99                         /usr/lib/libcuda.so.580.159.04
"""
MAPS_MANAGED = (
    MAPS_PLAIN
    + b"7f00c0000000-7f00c0400000 rw-s 7f00c0000000 00:06 420                    /dev/nvidia-uvm\n"
)
NET_UNIX = b"""\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 5210 /run/other.sock
0000000000000000: 00000002 00000000 00000000 0002 01 7001
0000000000000000: 00000002 00000000 00000000 0002 01 7002 @tmp/nccl-socket-1-5f3a9c0de@@@@@@@@@@@@
"""

PLAIN = Signs(
    pid=100,
    stopped=False,
    uvm_mappings=1,
    holds_mig=False,
    nccl=None,
    environ={},
    own_segments=frozenset(),
    foreign_segments=frozenset(),
    mps_daemon=False,
)


@dataclass
class NodeSaying:
    """What NVML would say; ``asked`` shows that it is asked only where the answer matters."""

    mig: Collection[int] = ()
    mps: Collection[int] | None = ()
    cuda: Mapping[int, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def mig_pids(self) -> Collection[int]:
        self.asked.append("mig")
        return self.mig

    def mps_pids(self) -> Collection[int] | None:
        self.asked.append("mps")
        return self.mps

    def cuda_pids(self) -> Mapping[int, int]:
        self.asked.append("cuda")
        return self.cuda


def kinds(signs: Signs, node: NodeSaying | None = None) -> list[tuple[str, bool]]:
    return [(o.kind, o.certain) for o in preflight.judge(signs, node or NodeSaying())]


# -- parsing --------------------------------------------------------------------------------------


def test_links_of_a_plain_process() -> None:
    links = preflight.parse_links(LINKS_PLAIN)
    assert links.holds_gpu
    assert links.segments == frozenset()
    assert links.sockets == {b"7001"}


def test_a_process_without_a_gpu_device_holds_none() -> None:
    assert not preflight.parse_links(["/dev/null", "/tmp/dev/nvidia0", "socket:[5]"]).holds_gpu


def test_a_deleted_segment_keeps_its_name() -> None:
    links = preflight.parse_links(["/dev/shm/cuda.shm.0.1a2b.1 (deleted)"])
    assert links.segments == {"/dev/shm/cuda.shm.0.1a2b.1"}


def test_only_a_capability_for_a_part_of_a_gpu_is_a_sign_of_mig() -> None:
    nvml = [*LINKS_PLAIN, "/dev/nvidia-caps/nvidia-cap1", "/dev/nvidia-caps/nvidia-cap2"]
    assert not preflight.parse_links(nvml).holds_mig
    assert preflight.parse_links([*nvml, "/dev/nvidia-caps/nvidia-cap30"]).holds_mig


def test_a_mapped_segment_is_seen_without_a_descriptor() -> None:
    maps = MAPS_PLAIN + (
        b"20a800000-20a814000 rw-s 00000000 00:1b 29            /dev/shm/cuda.shm.0.2be.1\n"
        b"20a900000-20a914000 rw-s 00000000 00:1b 30            /dev/shm/cuda.shm.0.2bf.1 (deleted)\n"
        b"20b800000-20b814000 rw-s 00000000 00:1b 31            /dev/shm/torch_702_2694116129_0\n"
    )
    names = {"/dev/shm/cuda.shm.0.2be.1", "/dev/shm/cuda.shm.0.2bf.1"}
    assert preflight.parse_segments(maps) == names
    assert preflight.parse_segments(MAPS_PLAIN) == frozenset()


@pytest.mark.parametrize(
    ("segment", "pid"),
    [
        ("/dev/shm/cuda.shm.0.1a2b.1", 0x1A2B),
        ("/dev/shm/cuda.shm.3e8.5.12", 5),
        ("/dev/shm/cuda.shm.0", None),
        ("/dev/shm/cuda.shm.0.pid.1", None),
    ],
)
def test_a_segment_names_its_exporter(segment: str, pid: int | None) -> None:
    assert preflight.segment_pid(segment) == pid


@pytest.mark.parametrize(
    ("inodes", "name"),
    [
        ({b"7002"}, "@tmp/nccl-socket-1-5f3a9c0de"),
        ({b"7001", b"5210"}, None),
        (set[bytes](), None),
    ],
)
def test_a_communicators_socket_counts_only_for_its_owner(
    inodes: set[bytes], name: str | None
) -> None:
    assert preflight.nccl_socket(NET_UNIX, inodes) == name


def test_the_state_is_found_behind_any_command_name() -> None:
    assert preflight.parse_state(b"12 (a) T (x)) S 1 12 12 0\n") == "S"


def test_pids_in_all_namespaces() -> None:
    assert preflight.parse_ns_pids(b"Name:\tpython\nNSpid:\t4711\t7\n") == {4711, 7}
    assert preflight.parse_ns_pids(b"Name:\tpython\n") == frozenset()


def test_environ_with_odd_entries() -> None:
    parsed = preflight.parse_environ(b"A=1\0EMPTY=\0noequals\0B=x=y\0\xff=\xfe\0")
    assert (parsed["A"], parsed["EMPTY"], parsed["B"]) == ("1", "", "x=y")
    assert "noequals" not in parsed


@pytest.mark.parametrize(
    ("environ", "safe"),
    [
        ({}, False),
        ({"NCCL_P2P_DISABLE": "1"}, False),
        ({"NCCL_CUMEM_ENABLE": "0"}, False),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0"}, True),
        ({"NCCL_P2P_DISABLE": "0", "NCCL_CUMEM_ENABLE": "0"}, False),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "1"}, False),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}, False),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}, True),
    ],
)
def test_which_settings_of_nccl_can_be_restored(environ: dict[str, str], safe: bool) -> None:
    assert preflight.nccl_is_safe(environ) is safe


# -- judging --------------------------------------------------------------------------------------


def test_a_plain_process_has_no_obstacle_and_nvml_is_not_asked() -> None:
    node = NodeSaying()
    assert kinds(PLAIN, node) == []
    assert node.asked == []


def test_what_the_kernel_or_nvml_says_cannot_be_forced() -> None:
    assert kinds(replace(PLAIN, stopped=True)) == [("stopped", True)]
    node = NodeSaying()
    assert kinds(PLAIN, node) == [] == node.asked
    assert kinds(replace(PLAIN, holds_mig=True), NodeSaying(mig={100})) == [("mig", True)]
    assert kinds(replace(PLAIN, mps_daemon=True), NodeSaying(mps={100})) == [("mps", True)]


def test_an_mps_daemon_alone_is_no_obstacle_but_silence_about_its_clients_is() -> None:
    assert kinds(replace(PLAIN, mps_daemon=True), NodeSaying(mps={7})) == []
    assert kinds(replace(PLAIN, mps_daemon=True), NodeSaying(mps=None)) == [("mps", False)]


@pytest.mark.parametrize(
    ("mappings", "gpus", "refused"), [(1, 1, False), (2, 1, True), (2, 2, False), (3, 2, True)]
)
def test_managed_memory_is_suspected_above_one_mapping_for_each_gpu(
    mappings: int, gpus: int, refused: bool
) -> None:
    signs = replace(PLAIN, uvm_mappings=mappings)
    assert kinds(signs, NodeSaying(cuda={100: gpus})) == [("managed_memory", False)] * refused


def test_a_process_that_nvml_does_not_list_is_taken_to_use_one_gpu() -> None:
    assert kinds(replace(PLAIN, uvm_mappings=2)) == [("managed_memory", False)]


def test_nccl_is_refused_unless_it_was_started_without_peer_to_peer() -> None:
    nccl = replace(PLAIN, nccl="the socket @tmp/nccl-socket-0-1")
    assert kinds(nccl) == [("nccl_p2p", False)]
    assert kinds(replace(nccl, environ={"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0"})) == []


def test_messages_name_the_process_and_the_way_out() -> None:
    nccl = replace(
        PLAIN, nccl="a mapping of /dev/shm/nccl-*", holds_mig=True, stopped=True, uvm_mappings=2
    )
    messages = {o.kind: o.message for o in preflight.judge(nccl, NodeSaying(mig={100}))}
    assert all("process 100" in message for message in messages.values())
    assert "NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0" in messages["nccl_p2p"]
    assert "kill -CONT 100" in messages["stopped"]
    assert "cudaMalloc" in messages["managed_memory"]


OWN = frozenset({"/dev/shm/cuda.shm.0.64.1"})


def test_exported_memory_that_nobody_opened_is_harmless() -> None:
    assert preflight.judge_sharing([replace(PLAIN, own_segments=OWN)], {}) == []


def test_an_importer_is_refused() -> None:
    (found,) = preflight.judge_sharing([replace(PLAIN, foreign_segments=OWN)], {})
    assert (found.pid, found.kind, found.certain) == (100, "ipc", False)


def test_an_exporter_is_refused_when_another_process_holds_its_segment() -> None:
    exporter = replace(PLAIN, own_segments=OWN)
    (found,) = preflight.judge_sharing([exporter], {next(iter(OWN)): {321}})
    assert "process 321" in found.message


def test_an_exporter_is_refused_when_its_tree_has_further_cuda_processes() -> None:
    members = [replace(PLAIN, own_segments=OWN), replace(PLAIN, pid=101)]
    assert [o.pid for o in preflight.judge_sharing(members, {})] == [100]


# -- reading real processes -----------------------------------------------------------------------

SCENE = """
import ctypes, mmap, os, socket, sys, threading
held = []
for sign in sys.argv[2:]:
    if sign == "socket":
        held.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        held[-1].bind(f"\\0tmp/nccl-socket-0-{os.getpid():x}".ljust(107, "\\0"))
    elif sign == "plain_socket":
        held.append(socket.socket())
    elif sign == "shm":
        path = f"/dev/shm/nccl-{os.getpid()}"
        with open(path, "wb+") as file:
            file.truncate(4096)
            held.append(mmap.mmap(file.fileno(), 4096))
        os.unlink(path)
    elif sign == "library":
        with open(sys.argv[1] + "/libnccl.so.2", "wb+") as file:
            file.truncate(4096)
            held.append(mmap.mmap(file.fileno(), 4096))
    elif sign == "thread":
        named = threading.Event()
        def run():
            libc = ctypes.CDLL(None)
            libc.prctl(15, b"pt_nccl_watchdg", 0, 0, 0)
            named.set()
            threading.Event().wait()
        threading.Thread(target=run, daemon=True).start()
        named.wait()
    elif sign in ("export", "import"):  # only an exporter keeps the descriptor
        owner = os.getpid() if sign == "export" else os.getppid()
        path = f"/dev/shm/cuda.shm.0.{owner:x}.{os.getpid()}"
        file = open(path, "wb+")
        os.unlink(path)
        file.truncate(4096)
        held.append(mmap.mmap(os.dup(file.fileno()), 4096) if sign == "export" else file)
        if sign == "import":
            libc = ctypes.CDLL(None)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap(None, ctypes.c_size_t(4096), 3, 1, file.fileno(), ctypes.c_long(0))
            file.close()
        else:
            held.append(file)
print("ready", flush=True)
sys.stdin.read()
"""


class Scenes:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.children: list[subprocess.Popen[str]] = []

    def __call__(self, *signs: str, **environ: str) -> int:
        child = subprocess.Popen(
            [sys.executable, "-c", SCENE, str(self._folder), *signs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )
        self.children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child.pid


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scenes]:
    scenes = Scenes(tmp_path)
    yield scenes
    for child in scenes.children:
        with child:
            child.kill()


def signs_of(pid: int) -> Signs:
    return preflight.read_signs(pid, preflight.read_links(pid))


def test_a_process_without_any_sign_shows_none(scene: Scenes) -> None:
    pid = scene()
    signs = signs_of(pid)
    assert signs == replace(PLAIN, pid=pid, uvm_mappings=0, environ=signs.environ)
    assert signs.environ["PATH"] == os.environ["PATH"]


def test_uvm_mappings_are_counted_by_their_exact_name() -> None:
    assert MAPS_PLAIN.count(preflight._UVM_LINE_END) == 1
    assert MAPS_MANAGED.count(preflight._UVM_LINE_END) == 2
    assert b"7f-80 rw-s 0 00:06 1 /dev/nvidia-uvm-tools\n".count(preflight._UVM_LINE_END) == 0


def test_nccl_is_seen_by_its_socket(scene: Scenes) -> None:
    pid = scene("socket")
    assert signs_of(pid).nccl == f"the socket @tmp/nccl-socket-0-{pid:x}"


def test_nccl_of_another_process_is_not_taken_for_ones_own(scene: Scenes) -> None:
    scene("socket")
    assert signs_of(scene()).nccl is None


def test_nccl_is_seen_by_its_shared_memory(scene: Scenes) -> None:
    assert signs_of(scene("shm", "plain_socket")).nccl == "a mapping of /dev/shm/nccl-*"


def test_a_process_group_without_communicator_is_no_sign_of_nccl(scene: Scenes) -> None:
    assert signs_of(scene("library", "thread", "plain_socket")).nccl is None


def test_a_loaded_library_alone_is_no_sign_of_nccl(scene: Scenes) -> None:
    assert signs_of(scene("library", "plain_socket")).nccl is None


def test_exporter_and_importer_are_told_apart_by_the_segments_name(scene: Scenes) -> None:
    exporter, importer = signs_of(scene("export")), signs_of(scene("import"))
    assert len(exporter.own_segments) == 1
    assert not exporter.foreign_segments
    assert len(importer.foreign_segments) == 1
    assert not importer.own_segments
    assert not preflight.read_links(importer.pid).segments, "an importer has no descriptor"


def test_an_mps_daemon_is_seen_where_the_process_would_look_for_it(
    scene: Scenes, tmp_path: Path
) -> None:
    (tmp_path / preflight._MPS_PID_FILE).write_text("1\n")
    assert signs_of(scene(CUDA_MPS_PIPE_DIRECTORY=str(tmp_path))).mps_daemon
    assert not signs_of(scene(CUDA_MPS_PIPE_DIRECTORY=str(tmp_path / "none"))).mps_daemon


def test_a_stopped_process_is_seen(scene: Scenes) -> None:
    pid = scene()
    assert not preflight.is_stopped(pid)
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while not preflight.is_stopped(pid):
        assert time.monotonic() < deadline
    assert signs_of(pid).stopped


def test_a_vanished_process_is_none_and_no_obstacle() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert preflight.read_state(child.pid) is None
    assert preflight.find_obstacles([child.pid], NodeSaying()) == []


def test_processes_without_a_gpu_are_not_judged(scene: Scenes) -> None:
    node = NodeSaying(mig=[scene("socket", "export")])
    assert preflight.find_obstacles(list(node.mig), node) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another user for a moment")
def test_a_process_that_may_not_be_examined_is_refused_but_may_be_forced() -> None:
    os.seteuid(65534)
    try:
        (found,) = preflight.find_obstacles([1], NodeSaying())
    finally:
        os.seteuid(0)
    assert (found.pid, found.kind, found.certain) == (1, "unreadable", False)
