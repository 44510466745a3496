"""What cannot be saved: told from /proc beforehand, refused by CRIU for real, and said in the same words."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import wait_until
from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import preflight, run, unix_peers
from gpusched.mechanisms.criu.complaint import explain
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside, Task
from gpusched.mechanisms.criu.preflight import Descriptor, Held
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.criu.unix_peers import UnixSocket
from gpusched.units import GIB
from isolated import PYTHON, Isolated, isolated

#: What a process does to hold it; then it counts, so that one can see that it lives.
HOLDERS = {
    "io_uring": "held = libc.syscall(425, 4, ctypes.create_string_buffer(120))",
    "userfaultfd": "held = libc.syscall(323, 0)",
    "unix_peer": "held = socket.socket(socket.AF_UNIX); held.connect(sys.argv[1] + '/socket')",
    "sysv_shm": "held = libc.shmat(libc.shmget(0, 4096, 0o1600), None, 0)",
    "device": "held = os.open(sys.argv[1] + '/device', os.O_RDONLY)",
    "nothing": "held = socket.create_server(('127.0.0.1', 0))",
}
SCRIPT = """
import ctypes, os, socket, sys, time
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
{hold}
assert held != -1, ctypes.get_errno()
count = 0
while True:
    count += 1
    print(count, flush=True)
    time.sleep(0.005)
"""
#: What is said where only CRIU has noticed.
SAYS = {
    "io_uring": "^job uses io_uring, which cannot be saved to disk",
    "userfaultfd": r"^job has an open userfaultfd \(fd \d+\) that cannot be saved$",
    "unix_peer": "^job is connected to another program through a Unix socket; close",
    "sysv_shm": "^job uses System V shared memory, which cannot be saved to disk$",
    "device": r"^job has device \d+:\d+ open \(fd \d+\)",
}
MESSAGES = {
    "io_uring": ("io_uring", "job uses io_uring (fd "),
    "userfaultfd": ("descriptor", "job has an open userfaultfd (fd "),
    "unix_peer": ("unix_peer", "job is connected to "),
    "sysv_shm": ("sysv_shm", "job uses System V shared memory, which cannot be saved"),
    "device": ("device", "/device is still open in job (fd "),
}


@contextlib.contextmanager
def holding(what: str, directory: Path) -> Iterator[Isolated]:
    script = SCRIPT.format(hold=HOLDERS[what])
    with isolated(directory / "log", [*PYTHON, "-c", script, str(directory)]) as tree:
        wait_until(lambda: len(tree.counts()) > 1, within_s=10, what="it holds it")
        yield tree


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory with a socket that somebody listens on, and a device node."""
    for name in ("loop-control", "fuse", "cpu_dma_latency", "hpet", "vda", "sda"):
        with contextlib.suppress(OSError):
            about = Path("/dev", name).stat()
            os.mknod(tmp_path / "device", stat.S_IFMT(about.st_mode) | 0o600, about.st_rdev)
            os.close(os.open(tmp_path / "device", os.O_RDONLY))
            break
        (tmp_path / "device").unlink(missing_ok=True)
    accepted = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):  # nobody came
                accepted.append(listener.accept())

        thread = threading.Thread(target=accept)
        thread.start()
        yield tmp_path
        listener.shutdown(socket.SHUT_RDWR)  # wakes it
        thread.join()
    for connection, _ in accepted:
        connection.close()


@pytest.mark.criu
@pytest.mark.parametrize("what", list(MESSAGES))
def test_what_cannot_be_saved_is_said_beforehand_and_refused_by_criu(
    what: str, outside: Path, criu: Program
) -> None:
    if what == "device" and not (outside / "device").exists():
        pytest.skip("no device to open here")
    store = ImageStore(outside / "images")
    with holding(what, outside) as tree, Inside(tree.init) as inside:
        found = preflight.obstacles(inside, "job", gpu_released=True)
        kind, words = MESSAGES[what]
        assert [one.kind for one in found] == [kind], found
        assert words in found[0].message
        assert found[0].certain
        assert found[0].pid == inside.tasks()[0].pid
        with store.begin("a") as draft, pytest.raises(errors.CriuError) as failed:
            run.dump(criu, inside, draft.criu_fd, name="job", timeout_s=30)
        assert re.search(SAYS[what], str(failed.value))
        assert failed.value.details["criu_log"]
        tree.wait_for_more()  # nothing happened to it
    assert store.images() == []
    assert store.used_bytes() == 0


@pytest.mark.criu
def test_a_process_against_which_nothing_speaks_has_no_obstacles(
    outside: Path, criu: Program
) -> None:
    with holding("nothing", outside) as tree, Inside(tree.init) as inside:
        assert preflight.obstacles(inside, "job", gpu_released=True) == []
        tasks = inside.tasks()
        assert preflight.writable_files(tasks) == [str(outside / "log")]
        assert preflight.writable_files(tasks, ignored=[str(outside / "log")]) == []
        (outside / "images").mkdir(mode=0o700)
        with ImageStore(outside / "images").begin("a") as draft:
            run.dump(criu, inside, draft.criu_fd, name="job", timeout_s=30)
            size = sum(f.stat().st_size for f in (outside / "images/a.tmp/criu").iterdir())
        assert 0.5 * size < preflight.image_bytes(tasks) < 2 * size


@pytest.mark.criu
def test_who_traces_it_is_named(outside: Path, criu: Program) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    seize, detach = 0x4206, 17
    with holding("nothing", outside) as tree, Inside(tree.init) as inside:
        pid = inside.tasks()[0].pid
        assert libc.ptrace(seize, pid, None, None) == 0, ctypes.get_errno()
        try:
            (found,) = preflight.obstacles(inside, "job", gpu_released=True)
            assert found.kind == "traced"
            assert f"job is traced by process {os.getpid()} (" in found.message
            with (
                ImageStore(outside / "images").begin("a") as draft,
                pytest.raises(errors.CriuError),
            ):
                run.dump(criu, inside, draft.criu_fd, name="job", timeout_s=30)
        finally:
            os.kill(pid, 19)  # one detaches from what is stopped
            os.waitpid(pid, 0x40000000)
            libc.ptrace(detach, pid, None, None)
            os.kill(pid, 18)
        tree.wait_for_more()


@pytest.mark.root
def test_a_process_that_left_its_parents_would_be_lost_and_is_said(tmp_path: Path) -> None:
    script = (
        "import os, time\nif os.fork() == 0:\n    os.fork() or time.sleep(60)\n    os._exit(0)\n"
        + ("os.wait()\nprint(1, flush=True)\ntime.sleep(60)\n")
    )
    script = script.replace(
        "os.fork() or time.sleep(60)", "os.fork() or (os.setsid(), time.sleep(60))"
    )
    with isolated(tmp_path / "log", [*PYTHON, "-c", script]) as tree, Inside(tree.init) as inside:
        wait_until(lambda: len(tree.counts()) == 1, within_s=10, what="it has a daemon")
        main = inside.find(1000)
        assert main is not None
        (orphan,) = [task for task in inside.tasks() if task != main]
        (found,) = preflight.obstacles(inside, "job", gpu_released=True)
        assert (found.kind, found.pid, found.certain) == ("orphan", orphan.pid, True)
        assert "has left its parents" in found.message


# -- judging --------------------------------------------------------------------------------------


def kinds(held: Held, *, gpu_released: bool = True) -> list[tuple[str, bool]]:
    return [
        (one.kind, one.certain) for one in preflight.judge(held, "job", gpu_released=gpu_released)
    ]


def fd(link: str, device: tuple[str, int, int] | None = None, size: int = 0) -> Descriptor:
    return Descriptor(fd=5, link=link, device=device, size_bytes=size)


@pytest.mark.parametrize(
    "link",
    ["eventfd", "eventpoll", "timerfd", "signalfd"],
)
def test_what_criu_saves_is_no_obstacle(link: str) -> None:
    assert kinds(Held(pid=7, descriptors=[fd(f"anon_inode:[{link}]")])) == []
    more = [
        fd("anon_inode:inotify"),
        fd("pipe:[3]"),
        fd("/memfd:x (deleted)"),
        fd("/x (deleted)", size=GIB),
    ]
    more.append(fd("/dev/null", ("chr", 1, 3)))
    assert (
        kinds(Held(pid=7, descriptors=more, mappings=["/dev/shm/x", "/lib/x.so", "[heap]"])) == []
    )


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (Held(pid=7, descriptors=[fd("anon_inode:[perf_event]")]), [("descriptor", True)]),
        (Held(pid=7, descriptors=[fd("anon_inode:bpf-prog")]), [("descriptor", True)]),
        (Held(pid=7, descriptors=[fd("/dmabuf:")]), [("descriptor", True)]),
        (Held(pid=7, descriptors=[fd("/dev/pts/3", ("chr", 136, 3))]), [("terminal", True)]),
        (Held(pid=7, descriptors=[fd("/dev/sda", ("blk", 8, 0))]), [("device", True)]),
        (Held(pid=7, descriptors=[fd("/x (deleted)", size=GIB + 1)]), [("deleted_file", True)]),
        (Held(pid=7, mappings=["/dev/dri/card0"]), [("device", True)]),
        (Held(pid=7, mappings=["/SYSV00000000 (deleted)", "/SYSV1"]), [("sysv_shm", True)]),
        (Held(pid=7, foreign_namespaces=["net", "pid"]), [("namespaces", False)]),
        (
            Held(
                pid=7, descriptors=[fd("anon_inode:[io_uring]")], mappings=["anon_inode:[io_uring]"]
            ),
            [("io_uring", True)],
        ),
    ],
)
def test_what_is_held_is_judged(held: Held, expected: list[tuple[str, bool]]) -> None:
    assert kinds(held) == expected


def test_the_drivers_devices_count_once_its_state_was_released() -> None:
    held = Held(
        pid=7, descriptors=[fd("/dev/nvidia0", ("chr", 195, 0))], mappings=["/dev/nvidia-uvm"]
    )
    assert kinds(held, gpu_released=False) == []
    first, second = preflight.judge(held, "job", gpu_released=True)
    assert first.message == (
        "/dev/nvidia0 is still open in job (fd 5, chr 195:0): its GPU state was not released"
    )
    assert second.message == "job has /dev/nvidia-uvm mapped: its GPU state was not released"


def test_only_connections_that_leave_the_tree_are_obstacles() -> None:
    held = [
        Held(pid=7, descriptors=[fd("socket:[1]"), fd("socket:[3]")]),
        Held(pid=8, descriptors=[fd("socket:[2]"), fd("socket:[5]")]),
    ]
    sockets = {
        1: UnixSocket(1, "", 2),  # to each other
        2: UnixSocket(2, "", 1),
        3: UnixSocket(3, "/listens", None),
        5: UnixSocket(5, "", 6),
        6: UnixSocket(6, "/run/theirs", 5),
    }
    (found,) = preflight.judge_sockets(held, sockets, "job")
    assert (found.pid, found.message) == (
        8,
        "job is connected to /run/theirs (Unix socket, fd 5); close it first",
    )


def test_all_that_hangs_from_the_main_process_is_no_orphan() -> None:
    def task(pid: int, parent: int, inner: int) -> Task:
        return Task(pid, parent, inner, 1, "S")

    tree = [task(20, 10, 1000), task(21, 20, 1001), task(22, 21, 1002)]
    assert preflight.judge_orphans(10, tree, "job", 1000) == []
    left = [*tree, task(30, 10, 1003), task(31, 30, 1004)]
    (found,) = preflight.judge_orphans(10, left, "job", 1000)
    assert "process 30 and 1 below it of job" in found.message
    (found,) = preflight.judge_orphans(10, [], "job", 1000)
    assert "has ended" in found.message


def test_the_kernel_tells_which_sockets_belong_together() -> None:
    one, other = socket.socketpair()
    with one, other:
        inodes = [os.fstat(end.fileno()).st_ino for end in (one, other)]
        known = unix_peers.read()
        assert [known[inode].peer for inode in inodes] == inodes[::-1]
        with socket.socket(socket.AF_UNIX) as named:
            named.bind(f"\0gpusched-test-{os.getpid()}")
            found = unix_peers.read()[os.fstat(named.fileno()).st_ino]
            assert (found.name, found.peer) == (f"@gpusched-test-{os.getpid()}", None)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("(00.1) Error (criu/util.c:9): send_fds failed (-22)", "job uses io_uring"),
        (
            "Error (criu/x.c:1): Can't dump file 5 of that type [20600] (chr 195:255)",
            "has device 195:255 open (fd 5)",
        ),
        ("Error (x): Can't dump half of stream unix connection.", "connected to another program"),
        (
            "Error (x): Task 1 with SysVIPC shmem map @7f doesn't live in IPC ns",
            "System V shared memory",
        ),
        (
            "(00.2)   1000: Error (criu/files-reg.c:2): File lib/x.so has bad size 3 (expect 4)",
            "lib/x.so was changed",
        ),
        (
            "(00.2) 7: Error (criu/some.c:2): Something new",
            "CRIU could not save job: Something new",
        ),
        ("", "CRIU could not save job: it did not say why"),
        (
            "(00.0) Error (criu/util.c:15): rlimit: Can't setup RLIMIT_NOFILE for self",
            "did not say why",
        ),
    ],
)
def test_criu_s_words_are_put_into_ours(log: str, words: str) -> None:
    assert words in explain(log, "job", "save")


def test_nobody_who_has_ended_holds_anything() -> None:
    pid = 4_000_000
    assert proc.read_stat(pid) is None
    assert preflight.read(pid, {}) == Held(
        pid=pid, descriptors=[], mappings=set(), foreign_namespaces=[]
    )


def test_names_of_users_do_not_decide_what_a_failure_means() -> None:
    log = "(00.1) Collected [/tmp/send_fds failed (-22) {0}]\n(00.2) Error (x.c:1): File {name}{1} has bad size"
    assert explain(log, "job", "save") == "{name}{1} was changed since job was saved"
