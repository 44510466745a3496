"""CRIU at work in the namespaces of a tree: saving, bringing back, and everything that can end it in the middle."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import ROOT, wait_until
from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import kept, opened, run, system
from gpusched.mechanisms.criu import tree as trees
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside, Task, open_log
from gpusched.mechanisms.criu.manifest import UsedFile
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.criu.system import read_machine
from gpusched.ports import Identity
from isolated import PYTHON, SAVER, Isolated, about, bring_back, counting, isolated, save

pytestmark = pytest.mark.criu


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    store = ImageStore(tmp_path / "images")
    yield store
    store.close()


# -- there and back -------------------------------------------------------------------------------


def test_a_saved_process_stands_still_and_goes_on_elsewhere_with_its_memory(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with counting(tmp_path / "log") as tree, Inside(tree.init) as inside:
        save(criu, tree, store)
        assert [task.state for task in inside.tasks()] == ["T"]
        at = tree.counts()[-1]
        sums = tree.sums()
    with isolated(tmp_path / "log2") as tree:
        back = bring_back(criu, tree, store, tmp_path / "log")
        assert back.main.inner_pid == run.MAIN_PID
        assert proc.identify(back.main.pid).start_ticks == back.main.start_ticks
        wait_until(lambda: len(tree.counts()) > 25, within_s=20, what="it counts on")
        assert tree.counts()[0] in (at, at + 1)
        assert tree.sums() == sums
        # And once more, from where it is now.
        store.delete("a")
        save(criu, tree, store)
    with isolated(tmp_path / "log3") as tree:
        bring_back(criu, tree, store, tmp_path / "log2")
        tree.wait_for_more(25)
        assert tree.sums() == sums


@pytest.mark.parametrize("fate", ["rotated", "vanished", "longer"])
def test_whatever_became_of_the_log_it_goes_on_in_the_new_one(
    fate: str, tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    log = tmp_path / "log"
    with counting(log) as tree, Inside(tree.init) as inside, store.begin("a") as draft:
        if fate == "vanished":
            log.unlink()
        saved = trees.save(criu, inside, draft, name="job", timeout_s=60)
        draft.commit(about(criu, used=saved.used, unnamed=saved.unnamed))
    if fate == "rotated":
        log.rename(tmp_path / "log.1")
        log.write_text("somebody else's\n")
    if fate == "longer":
        with log.open("a") as file:
            file.write("0 more\n" * 100)
    with isolated(tmp_path / "log2") as tree:
        bring_back(criu, tree, store, log)
        tree.wait_for_more()
    if fate == "rotated":
        assert log.read_text() == "somebody else's\n"


FAMILY = """
import os, sys, threading, time
names = [f"/dev/shm/part-{n}" for n in range(3)]
def count(name):
    with open(name, "a") as file:
        while True:
            file.write("x"); file.flush(); time.sleep(0.01)
for name in names[1:]:
    if os.fork() == 0:
        os.setsid()
        count(name)
for _ in range(4):
    threading.Thread(target=count, args=(names[0],), daemon=True).start()
shared = open("/dev/shm/gone", "w+"); shared.write("kept"); shared.flush(); os.unlink("/dev/shm/gone")
n = 0
while True:
    n += 1
    shared.seek(0)
    print(n, shared.read(), flush=True)
    time.sleep(0.01)
"""


def test_a_tree_comes_back_whole_with_its_shared_memory(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with isolated(tmp_path / "log", [*PYTHON, "-c", FAMILY]) as tree, Inside(tree.init) as inside:
        wait_until(lambda: len(inside.tasks()) == 3, within_s=10, what="all are there")
        tree.wait_for_more()
        pids = [task.inner_pid for task in inside.tasks()]
        save(criu, tree, store)
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        back = bring_back(criu, tree, store, tmp_path / "log")
        assert [task.inner_pid for task in back.tasks] == pids
        sizes = [shm_file(tree, f"part-{n}").stat().st_size for n in range(3)]
        assert all(sizes)
        wait_until(
            lambda: all(
                shm_file(tree, f"part-{n}").stat().st_size > sizes[n] + 2 for n in range(3)
            ),
            within_s=10,
            what="all of it goes on",
        )
        tree.wait_for_more()
        assert tree.sums() == {"kept"}


def shm_file(tree: Isolated, name: str) -> Path:
    return Path(f"/proc/{tree.init.pid}/root/dev/shm/{name}")


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        ("None", False),
        ("tempfile.TemporaryFile(dir=directory)", True),
        ("tempfile.TemporaryFile(dir='/dev/shm')", False),
        ("os.memfd_create('x')", False),
        ("mmap.mmap(-1, 4096)", False),
        ("socket.create_server(('127.0.0.1', 0))", False),
        ("socket.create_server('\\0' + directory, family=socket.AF_UNIX)", False),
        ("socket.create_server(directory + '/s', family=socket.AF_UNIX)", True),
    ],
)
def test_what_several_restores_would_make_in_the_same_place_is_seen(
    holds: str, expected: bool, tmp_path: Path
) -> None:
    script = "import mmap, os, socket, sys, tempfile, time\ndirectory = sys.argv[1]\n"
    script += f"held = {holds}\nprint(1, flush=True)\ntime.sleep(99)"
    with tempfile.TemporaryDirectory() as short:  # the name of a socket has 100 characters at most
        argv = [*PYTHON, "-c", script, short]
        with isolated(tmp_path / "log", argv) as tree, Inside(tree.init) as inside:
            wait_until(lambda: tree.counts() == [1], within_s=10, what="it holds it")
            assert opened.has_fixed_names(inside, inside.tasks()) is expected


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_dump_that_takes_too_long_is_ended_and_the_process_goes_on(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with counting(tmp_path / "log", mib=400) as tree, Inside(tree.init) as inside:
        with store.begin("a") as draft, pytest.raises(errors.DeadlineExceeded, match="took more"):
            run.dump(criu, inside, draft.criu_fd, name="job", timeout_s=0.1)
        assert run.find_running_criu(criu, inside) == []
        tree.wait_for_more()
    assert store.images() == []


def test_when_memory_is_short_criu_is_protected_from_its_first_moment_while_it_saves(
    tmp_path: Path, store: ImageStore, criu: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run._SCORES, "dump", 700)  # to lower one takes a capability
    script = tmp_path / "criu"
    script.write_text(
        f'#!/bin/sh\ncat /proc/self/oom_score_adj >>{tmp_path}/scores\nexec {criu.path} "$@"\n'
    )
    script.chmod(0o755)
    scored = dataclasses.replace(criu, path=str(script))
    with counting(tmp_path / "log") as tree:
        save(scored, tree, store)
    with isolated(tmp_path / "log2") as tree:
        back = bring_back(scored, tree, store, tmp_path / "log")
        assert Path(f"/proc/{back.main.pid}/oom_score_adj").read_text() == "0\n"
    assert (tmp_path / "scores").read_text() == "700\n0\n"


def test_who_was_stopped_before_a_failed_dump_is_stopped_after_it(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with counting(tmp_path / "log", mib=400) as tree, Inside(tree.init) as inside:
        (task,) = inside.tasks()
        os.kill(task.pid, signal.SIGSTOP)
        wait_until(lambda: inside.tasks()[0].is_stopped, within_s=5, what="it is stopped")
        with store.begin("a") as draft, pytest.raises(errors.DeadlineExceeded):
            run.dump(criu, inside, draft.criu_fd, name="job", timeout_s=0.1)
        wait_until(lambda: inside.tasks()[0].is_stopped, within_s=5, what="it is stopped again")
        at = tree.counts()[-1]
        time.sleep(0.05)
        assert tree.counts()[-1] == at
        os.kill(task.pid, signal.SIGCONT)
        tree.wait_for_more()


def test_a_parent_that_ends_during_a_save_costs_nobody_below_it(
    tmp_path: Path, store: ImageStore, criu: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its child would belong to the init, be in no image, and end with the original."""
    script = "import os, time\nif os.fork() == 0 and os.fork() == 0: os.setsid()\n"
    script += "while True: print(os.getpid(), flush=True); time.sleep(0.01)"
    with isolated(tmp_path / "log", [*PYTHON, "-c", script]) as tree, Inside(tree.init) as inside:
        wait_until(lambda: len(set(tree.counts())) == 3, within_s=10, what="three of them")
        main, parent, child = inside.tasks()
        assert (parent.parent, child.parent) == (main.pid, parent.pid)
        real = run.dump

        def dump(*args: Any, **kwargs: Any) -> run.Done:
            os.kill(parent.pid, signal.SIGKILL)
            wait_until(lambda: parent.pid not in _pids(inside), within_s=5, what="it has ended")
            return real(*args, **kwargs)

        monkeypatch.setattr(run, "dump", dump)
        with pytest.raises(errors.Unsupported, match="has left its parents"):
            save(criu, tree, store)
        assert _pids(inside) == {main.pid, child.pid} and store.images() == []
        before = tree.counts().count(child.inner_pid)
        wait_until(
            lambda: tree.counts().count(child.inner_pid) > before, within_s=5, what="it goes on"
        )


def _pids(inside: Inside) -> set[int]:
    return {task.pid for task in inside.tasks()}


def test_a_full_disk_in_the_middle_is_said_and_loses_nothing(tmp_path: Path, criu: Program) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M,mode=700", "tmpfs", disk], check=True)
    try:
        store = ImageStore(disk)
        with counting(tmp_path / "log", mib=48) as tree, Inside(tree.init) as inside:
            with (
                pytest.raises(
                    errors.InsufficientDisk, match="became full while job was saved"
                ) as failed,
                store.begin("a") as draft,
            ):
                trees.save(criu, inside, draft, name="job", timeout_s=60)
            assert failed.value.details["free_bytes"] < 1 << 20
            assert failed.value.details["criu_log"]
            tree.wait_for_more(25)
            assert len(tree.sums()) == 1
        assert list(disk.iterdir()) == []
        store.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_restore_that_fails_leaves_nobody_in_the_namespaces(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with counting(tmp_path / "log") as tree:
        save(criu, tree, store)
    (tmp_path / "images/a/criu/core-1000.img").write_bytes(b"\x13" * 300)
    with isolated(tmp_path / "log2") as tree, store.open("a") as image, Inside(tree.init) as inside:
        fd = image.open_criu()
        with pytest.raises(errors.CriuError, match="could not bring back job") as failed:
            run.restore(criu, inside, fd, name="job", timeout_s=30)
        os.close(fd)
        assert failed.value.details["errors"]
        assert inside.everybody() == []
        assert proc.read_stat(tree.init.pid) is not None


def test_a_file_that_was_changed_is_named_and_no_restore_is_begun(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    script = "import sys, time\nheld = open(sys.argv[1])\nprint(1, flush=True)\ntime.sleep(99)"
    (tmp_path / "data").write_text("x")
    argv = [*PYTHON, "-c", script, str(tmp_path / "data")]
    with isolated(tmp_path / "log", argv) as tree:
        wait_until(lambda: tree.counts() == [1], within_s=10, what="it holds the file")
        save(criu, tree, store)
    (tmp_path / "data").write_text("longer")
    with (
        isolated(tmp_path / "log2") as tree,
        pytest.raises(
            errors.CriuError, match="data is another file than when the process was saved"
        ),
    ):
        bring_back(criu, tree, store, tmp_path / "log")


# -- killed in the middle -------------------------------------------------------------------------


def test_a_dump_that_is_ended_at_any_moment_leaves_the_process_running_and_no_image(
    tmp_path: Path, store: ImageStore, criu: Program, soak: bool
) -> None:
    dice = random.Random(os.urandom(8))
    ended = set[str]()
    with counting(tmp_path / "log", mib=16) as tree, Inside(tree.init) as inside:
        for _ in range(100 if soak else 10):
            killer = threading.Timer(dice.uniform(0.0, 0.15), run.end_running_criu, (criu, inside))
            killer.start()
            survives(criu, tree, inside, store, ended, killer, threading.Event())
        tree.wait_for_more(25)
        assert len(tree.sums()) == 1
    assert ended == {"could not save job: CRIU was ended by signal 9"}


def test_criu_killed_while_it_writes_leaves_the_process_running_and_no_image(
    tmp_path: Path, store: ImageStore, criu: Program, soak: bool
) -> None:
    dice = random.Random(os.urandom(8))
    ended = set[str]()
    pages, over = store.root / "a.tmp/criu/pages-1.img", threading.Event()

    def is_writing() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return pages.stat().st_size > 8 << 20
        return False

    def kill_while_writing() -> None:
        while not is_writing():  # it takes 0.1 s
            if over.wait(0.001):
                return
        time.sleep(dice.uniform(0.0, 0.01))
        for pid in run.find_running_criu(criu, inside):
            with contextlib.suppress(ProcessLookupError):
                if proc.inner_pid(pid) != pid:  # nsenter is left, as when somebody else does it
                    os.kill(pid, signal.SIGKILL)

    with counting(tmp_path / "log", mib=160) as tree, Inside(tree.init) as inside:
        for _ in range(100 if soak else 10):
            over.clear()
            killer = threading.Thread(target=kill_while_writing)
            killer.start()
            survives(criu, tree, inside, store, ended, killer, over)
        tree.wait_for_more(25)
        assert len(tree.sums()) == 1
    assert ended == {"could not save job: CRIU was ended by signal 9"}


def survives(
    criu: Program,
    tree: Isolated,
    inside: Inside,
    store: ImageStore,
    ended: set[str],
    killer: threading.Thread,
    over: threading.Event,
) -> None:
    """One save, with somebody who ends it; why it ended goes into ``ended``."""
    try:
        save(criu, tree, store)
    except errors.CriuError as error:
        ended.add(str(error))
        assert store.images() == []
    else:  # it was faster
        store.open("a").verify()
        store.delete("a")
        run.resume(inside.tasks())
    finally:
        over.set()
        killer.join()
    assert store.used_bytes() == 0
    assert run.find_running_criu(criu, inside) == []
    tree.wait_for_more()


def test_after_the_daemon_was_killed_the_next_one_ends_its_criu_and_nothing_is_lost(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    seen = 0
    with counting(tmp_path / "log", mib=64) as tree, Inside(tree.init) as inside:
        for delay in (0.005, 0.03, 0.06, 0.1, 1.0):
            saver = start_saver(criu, tree.init, store.root)
            time.sleep(delay)
            saver.kill()
            saver.wait()
            seen += bool(run.find_running_criu(criu, inside))
            trees.recover(criu, inside, store, "a")
            assert run.find_running_criu(criu, inside) == []
            assert store.used_bytes() == 0
            tree.wait_for_more()
        tree.wait_for_more(25)
        assert len(tree.sums()) == 1
    assert seen > 0


def start_saver(criu: Program, init: Identity, root: Path) -> subprocess.Popen[str]:
    argv = [criu.path, criu.executable, str(init.pid), str(init.start_ticks), str(root)]
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, *argv], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert saver.stdout is not None
    with saver.stdout as said:
        assert said.readline() == "begin\n"
    return saver


def test_a_process_that_calls_itself_criu_is_not_taken_for_it(
    tmp_path: Path, criu: Program
) -> None:
    fake = tmp_path / "criu"
    shutil.copy("/bin/sleep", fake)
    script = (
        f"import os\nos.execve({str(fake)!r}, [{criu.path!r}, '60'], {{'GPUSCHED_INSIDE': 'x'}})"
    )
    with isolated(tmp_path / "log", [*PYTHON, "-c", script]) as tree, Inside(tree.init) as inside:
        wait_until(lambda: is_named(inside.tasks(), "criu"), within_s=5, what="it has that name")
        assert run.find_running_criu(criu, inside) == []


def test_a_users_own_process_of_the_same_program_is_not_taken_for_it_either(
    tmp_path: Path, criu: Program
) -> None:
    """The loader of a CRIU that make_criu.sh made runs any program, for everybody."""
    program = tmp_path / "criu"
    shutil.copy("/bin/sleep", program)
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o755)
    same = Program(path=str(program), version=criu.version, executable=str(program))
    with (
        isolated(tmp_path / "log", [str(program), "60"], uid=65534) as tree,
        Inside(tree.init) as inside,
    ):
        wait_until(lambda: is_named(inside.tasks(), "criu"), within_s=5, what="it runs")
        assert run.find_running_criu(same, inside) == []
    with isolated(tmp_path / "log3", [str(program), "60"]) as tree, Inside(tree.init) as inside:
        wait_until(lambda: is_named(inside.tasks(), "criu"), within_s=5, what="root's runs")
        assert run.find_running_criu(same, inside) == [inside.tasks()[0].pid]


def is_named(tasks: list[Task], name: str) -> bool:
    return any(Path(f"/proc/{t.pid}/comm").read_text().strip() == name for t in tasks)


# -- the namespaces -------------------------------------------------------------------------------


def test_namespaces_of_a_process_that_is_gone_or_has_none_are_refused() -> None:
    me = proc.identify(os.getpid())
    with pytest.raises(errors.Unsupported, match="no namespaces of its own"):
        Inside(me)
    with pytest.raises(errors.NotFound):
        Inside(Identity(pid=me.pid, start_ticks=me.start_ticks + 1, boot_id=me.boot_id))
    with pytest.raises(errors.NotFound):
        Inside(Identity(pid=4_000_000, start_ticks=1, boot_id=me.boot_id))


def test_files_are_opened_as_the_tree_sees_them_and_logs_only_where_they_are_the_users(
    tmp_path: Path,
) -> None:
    (tmp_path / "link").symlink_to("/dev/shm/inside")
    (tmp_path / "other").write_text("")
    with isolated(tmp_path / "log") as tree, Inside(tree.init) as inside:
        shm_file(tree, "inside").write_text("seen")
        fd = inside.open(str(tmp_path / "link"), os.O_RDONLY)
        assert os.read(fd, 10) == b"seen"
        os.close(fd)
        new = tmp_path / "new"
        os.close(open_log(inside, str(new), 65534, 65534))
        assert (new.stat().st_uid, new.stat().st_mode & 0o777) == (65534, 0o600)
        os.close(open_log(inside, str(new), 65534, 65534))
        for path in ("other", "link", ""):  # of somebody else, a link, a directory
            with pytest.raises(OSError):
                open_log(inside, str(tmp_path / path), 65534, 65534)


# -- what somebody may put in the place of a file -------------------------------------------------

HOLDER = """
import ctypes, sys, time
held = open(sys.argv[1], "r+")
library = ctypes.CDLL(sys.argv[2]) if len(sys.argv) > 2 else None
n = 0
while True:
    n += 1
    print(n, ctypes.c_char_p.in_dll(library, "told").value.decode() if library else held.readline(), flush=True)
    held.seek(0)
    time.sleep(0.01)
"""


@contextlib.contextmanager
def saved_holder(
    tmp_path: Path, store: ImageStore, criu: Program, *libraries: Path
) -> Iterator[Path]:
    """A process with a file open, saved; gives the file."""
    data = tmp_path / "data"
    data.write_text("mine\n")
    argv = [*PYTHON, "-c", HOLDER, str(data), *map(str, libraries)]
    with isolated(tmp_path / "log", argv) as tree:
        wait_until(lambda: len(tree.counts()) > 1, within_s=10, what="it holds it")
        save(criu, tree, store)
    yield data


@pytest.mark.parametrize("what", ["link", "other", "owner"])
def test_another_file_in_the_place_of_an_open_one_is_refused(
    what: str, tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root\n")
    with saved_holder(tmp_path, store, criu) as data:
        if what == "owner":
            os.chown(data, 65534, 65534)
        else:
            data.unlink()
            data.symlink_to(secret) if what == "link" else data.write_text("root\n")
    with (
        isolated(tmp_path / "log2") as tree,
        pytest.raises(errors.CriuError, match="cannot come back: ") as said,
    ):
        bring_back(criu, tree, store, tmp_path / "log")
    assert f"{tmp_path}/data is" in str(said.value)
    assert not tree.counts()


def test_a_link_that_appears_between_the_check_and_the_restore_gives_nobody_a_file_of_roots(
    tmp_path: Path, store: ImageStore, criu: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root\n")
    with saved_holder(tmp_path, store, criu) as data:
        real = run.restore

    def restore(*args: Any, **more: Any) -> run.Restored:
        data.unlink()
        data.symlink_to(secret)
        return real(*args, **more)

    monkeypatch.setattr(run, "restore", restore)
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        with pytest.raises(errors.CriuError, match=f"came back with {secret} open"):
            bring_back(criu, tree, store, tmp_path / "log")
        assert inside.everybody() == []
    assert tree.counts() == []


def test_a_file_of_roots_that_loses_its_name_in_that_moment_is_given_to_nobody_either(
    tmp_path: Path, store: ImageStore, criu: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root\n")
    with saved_holder(tmp_path, store, criu) as data:
        real = run.restore

    def restore(*args: Any, **more: Any) -> run.Restored:
        data.unlink()
        data.symlink_to(secret)
        done = real(*args, **more)
        secret.unlink()  # as programs do with their temporary files
        return done

    monkeypatch.setattr(run, "restore", restore)
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        with pytest.raises(errors.CriuError, match=r"came back with .*secret \(deleted\) open"):
            bring_back(criu, tree, store, tmp_path / "log")
        assert inside.everybody() == []
    assert tree.counts() == []


NAMELESS = """
import mmap, multiprocessing, os, sys, tempfile, time
file = tempfile.TemporaryFile(dir=sys.argv[1]); file.write(b"file"); file.flush()
path = sys.argv[1] + "/mapped"
with open(path, "w+b") as other:
    other.write(b"m" * 5000); other.flush()
    mapped = mmap.mmap(other.fileno(), 5000)
os.unlink(path)
directory = sys.argv[1] + "/gone"
os.mkdir(directory); os.chdir(directory); os.rmdir(directory)
memory = os.memfd_create("m"); os.write(memory, b"memory")
shared = mmap.mmap(-1, 4096); shared[:6] = b"shared"
semaphore = multiprocessing.get_context("fork").Semaphore(3)
n = 0
while True:
    n += 1
    assert os.pread(file.fileno(), 9, 0) == b"file" and mapped[4999:] == b"m"
    assert os.pread(memory, 9, 0) == b"memory" and shared[:6] == b"shared"
    print(n, flush=True)
    time.sleep(0.01)
"""


def test_files_without_a_name_come_back(tmp_path: Path, store: ImageStore, criu: Program) -> None:
    (tmp_path / "own").mkdir(mode=0o777)
    (tmp_path / "own").chmod(0o777)
    argv = [os.path.realpath(sys.executable), "-c", NAMELESS, str(tmp_path / "own")]
    with isolated(tmp_path / "log", argv) as tree:
        tree.wait_for_more()
        save(criu, tree, store)
    with isolated(tmp_path / "log2") as tree:
        bring_back(criu, tree, store, tmp_path / "log")
        tree.wait_for_more()


def test_a_link_in_shared_memory_gives_nobody_a_file_of_roots(
    tmp_path: Path, store: ImageStore, criu: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root\n")
    script = "import os, time\nheld = open('/dev/shm/x', 'w+')\nos.write(held.fileno(), b'mine.')\n"
    script += "print(1, flush=True)\ntime.sleep(99)"
    with isolated(tmp_path / "log", [*PYTHON, "-c", script]) as tree, Inside(tree.init) as inside:
        wait_until(lambda: tree.counts() == [1], within_s=10, what="it holds it")
        real = run.dump

        def dump(*args: Any, **more: Any) -> run.Done:
            done = real(*args, **more)
            shm_file(tree, "x").unlink()  # through /proc/PID/root, as their user can
            shm_file(tree, "x").symlink_to(secret)
            return done

        monkeypatch.setattr(run, "dump", dump)
        save(criu, tree, store)
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        with pytest.raises(errors.CriuError, match=f"came back with {secret} open"):
            bring_back(criu, tree, store, tmp_path / "log")
        assert inside.everybody() == []


MAPPER = """
import mmap, sys, time, zlib
file = open(sys.argv[1], "rb")
held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
file.close()
n = 0
while True:
    n += 1
    print(n, zlib.crc32(held), flush=True)
    time.sleep(0.01)
"""


def test_a_pipe_in_the_place_of_a_library_does_not_stop_the_daemon(
    tmp_path: Path, store: ImageStore
) -> None:
    library = tmp_path / "library"
    shutil.copy("/bin/true", library)
    script = "import mmap, sys, time\nfile = open(sys.argv[1], 'rb')\n"
    script += "held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\nprint(1, flush=True)\ntime.sleep(99)"
    argv = [*PYTHON, "-c", script, str(library)]
    found: list[UsedFile] = []
    with isolated(tmp_path / "log", argv) as tree, Inside(tree.init) as inside:
        wait_until(lambda: tree.counts() == [1], within_s=10, what="it holds it")
        used = [f for f in system.used_files(inside, inside.tasks()) if f.path == str(library)]
        assert used[0].mapped and used[0].stamp.elf
        library.unlink()
        os.mkfifo(library)
        with store.begin("a") as draft:
            keeper = threading.Thread(
                target=lambda: found.extend(kept.keep(draft, inside, used)), daemon=True
            )
            keeper.start()
            keeper.join(5)
            assert [one.kept for one in found] == [None]


def test_what_ends_while_it_is_looked_at_holds_nothing(tmp_path: Path) -> None:
    with counting(tmp_path / "log") as tree, Inside(tree.init) as inside:
        tasks = inside.tasks()
        os.kill(tasks[0].pid, signal.SIGKILL)
        wait_until(lambda: not inside.tasks(), within_s=5, what="it has ended")
        assert opened.unnamed_files(tasks) == ()
        assert opened.has_fixed_names(inside, tasks) is False
        opened.check(inside, tasks, (), (), "job")


def test_a_library_that_was_upgraded_does_not_strand_an_image(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    old, new = tmp_path / "libtold.so", tmp_path / "new.so"
    for path, word in ((old, "old"), (new, "new")):
        source = f'char *told = "{word} {"x" * len(path.name)}";'
        command = [compiler, "-shared", "-x", "c", "-", "-o", str(path), "-Wl,--build-id"]
        subprocess.run(command, input=source.encode(), check=True, timeout=30)
    with saved_holder(tmp_path, store, criu, old):
        pass
    new.rename(old)  # as package managers do
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        with store.open("a") as image:
            kept_file = next(one for one in image.manifest.used if one.path == str(old))
            assert kept_file.kept
            (change,) = trees.differences(
                image, inside, read_machine(criu), [str(tmp_path / "log")]
            )
        assert (change.kind, change.blocks) == ("file", False)
        assert "the image has a copy" in change.message
        bring_back(criu, tree, store, tmp_path / "log")
        tree.wait_for_more()
        assert tree.sums() == {"old"}
        # Only the process that was saved still has it.
        mounts = Path(f"/proc/{tree.init.pid}/mountinfo").read_text()
        assert str(old) not in mounts
    assert all(path.stat().st_nlink == 1 for path in store.root.rglob("kept/*"))


def test_an_old_library_is_there_for_the_process_and_not_for_criu(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    """As after an upgrade of the C library, where today's programs do not run with that of then."""
    used, today = tmp_path / "used", tmp_path / "today"
    shutil.copy("/bin/false", used)
    shutil.copy(os.path.realpath("/bin/sh"), today)
    script = tmp_path / "criu"
    script.write_text(f'#!{used}\nexec {criu.path} "$@"\n')
    script.chmod(0o755)
    argv = [*PYTHON, "-c", MAPPER, str(used)]
    with isolated(tmp_path / "log", argv) as tree:
        wait_until(lambda: len(tree.counts()) > 1, within_s=10, what="it has it mapped")
        sums = tree.sums()
        save(criu, tree, store)
    today.rename(used)
    assert sums != {str(zlib.crc32(used.read_bytes()))}
    needs_today = dataclasses.replace(criu, path=str(script))
    with isolated(tmp_path / "log2") as tree:
        bring_back(needs_today, tree, store, tmp_path / "log")
        tree.wait_for_more()
        assert tree.sums() == sums
        assert str(used) not in Path(f"/proc/{tree.init.pid}/mountinfo").read_text()


def test_a_kept_library_that_is_damaged_is_said_and_nothing_is_begun(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    used = tmp_path / "used"
    shutil.copy("/bin/false", used)
    with isolated(tmp_path / "log", [*PYTHON, "-c", MAPPER, str(used)]) as tree:
        wait_until(lambda: len(tree.counts()) > 1, within_s=10, what="it has it mapped")
        save(criu, tree, store)
    shutil.copy("/bin/true", tmp_path / "today")
    (tmp_path / "today").rename(used)
    with store.open("a") as image:
        kept_file = next(one for one in image.manifest.used if one.path == str(used))
        (image.path / "kept" / str(kept_file.kept)).write_bytes(b"\x7fELF garbage")
    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        with pytest.raises(errors.CriuError, match=f"kept copy of {used} .*: it is damaged"):
            bring_back(criu, tree, store, tmp_path / "log")
        assert inside.everybody() == []
        assert str(used) not in Path(f"/proc/{tree.init.pid}/mountinfo").read_text()


def test_what_fails_at_the_gate_ends_criu_there(
    tmp_path: Path, store: ImageStore, criu: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counting(tmp_path / "log") as tree:
        save(criu, tree, store)

    def fail() -> None:
        raise errors.CriuError("no")

    with isolated(tmp_path / "log2") as tree, Inside(tree.init) as inside:
        with store.open("a") as image:
            fd = image.open_criu()
            with pytest.raises(errors.CriuError, match="no"):
                run.restore(criu, inside, fd, name="job", timeout_s=60, once_loaded=fail)
            os.close(fd)
        assert inside.everybody() == []
        assert run.find_running_criu(criu, inside) == []
