"""Attacks by an ordinary user on the daemon, on other users and on root: each of them once worked.

Mallory has an account. What another user merely may not do is in ``test_security.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from daemons import PrivateDaemon, request, wait_until
from gpusched import errors
from gpusched.domain.states import ProcState
from gpusched.engine.admission import ENTRIES_PER_UID, require_few
from gpusched.engine.leases import MAX_LEASES
from gpusched.engine.model import Caller, Process
from gpusched.mechanisms.sim.script import Script
from gpusched.rescue import rescue
from live import (
    ALICE,
    MALLORY,
    SLEEP,
    Line,
    ask,
    ask_as,
    children,
    find,
    is_alive,
    is_stopped,
    others_env,
    others_python,
    others_workload,
    process,
    run_as,
    running,
    wait_ready,
    wait_state,
)

pytestmark = pytest.mark.root

#: The longest that an attack may keep somebody else's ``status`` waiting. Before, it was seconds.
PATIENCE_S = 0.8


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running(gpus=1, vram="64M") as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def nothing_is_left(daemon: PrivateDaemon) -> Iterator[None]:
    yield
    for found in ask(daemon, "status")["processes"]:
        ask(daemon, "kill", name=found["name"], force=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short directory that every user may enter."""
    path = Path("/tmp") / f"gs-attack-{os.getpid()}"
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


class Bystander:
    """Asks for ``status`` all the time; ``worst_s`` is the longest that it had to wait."""

    def __init__(self, daemon: PrivateDaemon) -> None:
        self.worst_s = 0.0
        self._path = daemon.socket
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            begun = time.monotonic()
            request(self._path, "status")
            self.worst_s = max(self.worst_s, time.monotonic() - begun)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def run(daemon: PrivateDaemon, uid: int, name: str, *cmd: str, **params: Any) -> int:
    answer = ask_as(uid, daemon.socket, "run", name=name, cmd=list(cmd), dir="/", **params)
    assert answer["ok"], answer
    return int(answer["result"]["pid"])


def script(uid: int, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = run_as(uid, [others_python(), "-I", "-S", "-c", code, *arguments])
    assert done.returncode == 0, done.stderr
    return done


# -- keeping the daemon busy ----------------------------------------------------------------------

_EMPTY_LINES = """
import socket, sys, threading
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
def read():
    seen = 0
    while seen < 60_000:
        seen += connection.recv(1 << 20).count(b"\\n")
reader = threading.Thread(target=read)
reader.start()
connection.sendall(b"\\n" * 60_000)
reader.join()
"""


def test_a_flood_of_short_lines_keeps_nobody_waiting(daemon: PrivateDaemon) -> None:
    with Bystander(daemon) as other:
        script(MALLORY, _EMPTY_LINES, daemon.socket)
    assert other.worst_s < PATIENCE_S


_FOLLOW = """
import json, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
request = {"method": "logs", "params": {"name": "x", "lines": 1, "follow": True}}
connection.sendall(json.dumps(request).encode() + b"\\n")
seen = connection.recv(1 << 20).count(b"\\n")
open(sys.argv[2], "w").close()
while seen < 240_000:
    seen += connection.recv(1 << 20).count(b"\\n")
"""


def test_a_log_that_grows_fast_keeps_nobody_waiting(daemon: PrivateDaemon, folder: Path) -> None:
    go = folder / "go"
    run(
        daemon,
        MALLORY,
        "x",
        "sh",
        "-c",
        f"until [ -e {go} ]; do sleep 0.05; done; yes '' | head -c 250000",
    )
    folder.chmod(0o777)
    with Bystander(daemon) as other:
        script(MALLORY, _FOLLOW, daemon.socket, str(go))
    assert other.worst_s < PATIENCE_S


_MANY_LOGS = """
import json, socket, sys
connections = []
for _ in range(20):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    request = {"method": "logs", "params": {"name": "x", "lines": -1}}
    connection.sendall(json.dumps(request).encode() + b"\\n")
    connections.append(connection)
connections[0].recv(1)
sys.stdin.readline()
"""


def peak_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def test_huge_logs_do_not_fill_the_daemons_memory(daemon: PrivateDaemon) -> None:
    run(daemon, MALLORY, "x", "sh", "-c", "truncate -s 8T /proc/self/fd/1; exec sleep 1000")
    log = daemon.log_dir / "x.log"
    wait_until(lambda: log.stat().st_size > 1 << 40, within_s=10, what="the log is huge")
    before = peak_bytes(daemon.pid)
    command = [others_python(), "-I", "-S", "-c", _MANY_LOGS, daemon.socket]
    program = subprocess.Popen(command, user=MALLORY, group=MALLORY, stdin=subprocess.PIPE)
    try:
        with Bystander(daemon) as other:
            answer = ask(daemon, "logs", name="x", lines=-1)  # root is served beside her
        assert len(answer["output"]) < 8 << 20
    finally:
        program.kill()
        program.communicate()
    assert other.worst_s < PATIENCE_S
    assert peak_bytes(daemon.pid) - before < 700 << 20


_CHAIN = """
import os, signal, sys
os.closerange(3, 100)
top = os.getpid()
for _ in range(int(sys.argv[1])):
    if os.fork():
        signal.pause()
print(top, flush=True)
signal.pause()
"""


def test_a_long_chain_of_processes_keeps_nobody_waiting(daemon: PrivateDaemon) -> None:
    program = subprocess.Popen(
        [others_python(), "-I", "-S", "-c", _CHAIN, "300"],
        user=MALLORY,
        group=MALLORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline().strip() == str(program.pid)
        with Bystander(daemon) as other:
            assert ask_as(MALLORY, daemon.socket, "adopt", pid=program.pid, name="x")["ok"]
            assert ask_as(MALLORY, daemon.socket, "freeze", name="x")["ok"]
        assert other.worst_s < PATIENCE_S
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


_LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.readline()
"""


def test_programs_that_hang_at_their_start_hold_up_their_owner_alone(
    daemon: PrivateDaemon, folder: Path
) -> None:
    """An execve waits for whoever has a lease on the file: 45 s."""
    program = folder / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    os.chown(program, MALLORY, MALLORY)
    holder = subprocess.Popen(
        [others_python(), "-I", "-S", "-c", _LEASE, str(program)],
        user=MALLORY,
        group=MALLORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with ThreadPoolExecutor(6) as pool:
            for number in range(6):
                pool.submit(
                    ask_as,
                    MALLORY,
                    daemon.socket,
                    "run",
                    name=f"m{number}",
                    cmd=[str(program)],
                    dir="/",
                )
            wait_until(
                lambda: len(ask(daemon, "status")["processes"]) == 6, within_s=20, what="all wait"
            )
            begun = time.monotonic()
            run(daemon, ALICE, "alices", *SLEEP)
            assert time.monotonic() - begun < 10
            holder.kill()  # and all of them begin
    finally:
        holder.kill()
        holder.communicate()


# -- growing without end --------------------------------------------------------------------------


def test_a_user_has_a_limited_number_of_entries() -> None:
    caller = Caller(uid=MALLORY, gid=MALLORY, pid=1, connection=1, privileged=False)
    mine = [
        Process(
            tree_id=str(number),
            name=str(number),
            uid=MALLORY,
            user="mallory",
            gpus=(),
            started_unix_s=0.0,
            last_used_unix_s=0.0,
            state=ProcState.DEAD,
        )
        for number in range(ENTRIES_PER_UID)
    ]
    require_few(caller, mine[1:])
    with pytest.raises(errors.Unavailable, match="kill"):
        require_few(caller, mine)
    require_few(Caller(uid=ALICE, gid=ALICE, pid=1, connection=1, privileged=False), mine)
    require_few(Caller(uid=0, gid=0, pid=1, connection=1, privileged=True), mine)


def test_leases_do_not_pile_up(daemon: PrivateDaemon) -> None:
    ask(daemon, "run", name="x", cmd=SLEEP, dir="/")
    with Line(daemon.socket) as line:
        for params in ({}, {"for_s": 1000}):
            for _ in range(MAX_LEASES):
                line.result("acquire", name="x", **params)
            assert line.code("acquire", name="x", **params) == "unavailable"
            assert line.result("release", name="x")["released"] == MAX_LEASES
            line.result("acquire", name="x", **params)
            line.result("release", name="x")


# -- what is not hers -----------------------------------------------------------------------------


@pytest.fixture
def become_root(folder: Path) -> str:
    """A set-uid program that starts its arguments as root: what su and sudo are."""
    program = shutil.which("setpriv")
    if program is None or os.statvfs("/tmp").f_flag & os.ST_NOSUID:
        pytest.skip("needs setpriv and a /tmp where set-uid programs work")
    shutil.copy(program, folder / "become")
    (folder / "become").chmod(0o4755)
    return f"{folder}/become --reuid 0"


def roots(pid: int) -> list[int]:
    return [p for p in children(pid) if "\nUid:\t0\t0" in Path(f"/proc/{p}/status").read_text()]


def test_the_end_of_a_tree_does_not_end_roots_processes(
    daemon: PrivateDaemon, become_root: str
) -> None:
    pid = run(daemon, MALLORY, "x", "sh", "-c", f"{become_root} sleep 1000 & sleep 1000 & wait")
    wait_until(lambda: roots(pid) and len(children(pid)) == 2, within_s=10, what="both are there")
    foreign = roots(pid)[0]
    own = next(p for p in children(pid) if p != foreign)
    try:
        os.kill(pid, signal.SIGKILL)
        wait_state(daemon, "x", "dead")
        wait_until(lambda: not is_alive(own), within_s=10, what="the rest of the tree is ended")
        assert is_alive(foreign)
    finally:
        os.kill(foreign, signal.SIGKILL)


def test_what_became_roots_in_the_middle_of_a_freeze_is_not_stopped(
    daemon: PrivateDaemon, become_root: str, folder: Path
) -> None:
    go = folder / "go"
    workload = " ".join(others_workload("8M")["cmd"])
    shell = f"{workload} & until [ -e {go} ]; do sleep 0.02; done; {become_root} sleep 1000 & wait"
    pid = run(daemon, MALLORY, "x", "sh", "-c", shell, env=others_env())
    wait_ready(daemon, "x")
    told = Script(daemon.sim_dir)
    told.add("lock", delay_s=2.0)
    try:
        with ThreadPoolExecutor(1) as pool:
            freezing = pool.submit(ask_as, MALLORY, daemon.socket, "freeze", name="x")
            wait_until(lambda: told.fired("lock"), within_s=10, what="the lock is under way")
            go.touch()
            wait_until(lambda: roots(pid), within_s=10, what="a descendant is root's")
            foreign = roots(pid)[0]
            answer = freezing.result()
        assert answer.get("code") == "permission_denied", answer
        assert not is_stopped(foreign)
        assert process(daemon, "x")["state"] == "active"
    finally:
        told.clear()
        for each in roots(pid):
            os.kill(each, signal.SIGKILL)


_FORKS = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: os.fork() and print("forked", flush=True))
print("up", flush=True)
while True:
    signal.pause()
"""


def test_nobody_keeps_the_protection_of_a_frozen_process(daemon: PrivateDaemon) -> None:
    pid = run(daemon, MALLORY, "x", others_python(), "-I", "-S", "-c", _FORKS, env=others_env())
    wait_until(lambda: ask(daemon, "logs", name="x")["lines"], within_s=10, what="it is up")
    assert ask_as(MALLORY, daemon.socket, "freeze", name="x")["ok"]
    if Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n":
        pytest.skip("this machine lets nobody lower an OOM score")
    script(MALLORY, f"import os; os.kill({pid}, 10); os.kill({pid}, 18)")
    wait_until(lambda: children(pid), within_s=10, what="she went on in spite of it, and forked")
    assert ask_as(MALLORY, daemon.socket, "thaw", name="x")["ok"]
    for each in (pid, *children(pid)):
        assert Path(f"/proc/{each}/oom_score_adj").read_text() == "0\n"


def test_a_users_log_is_not_overwritten_by_the_next_user_of_the_name(daemon: PrivateDaemon) -> None:
    for uid in (ALICE, MALLORY, MALLORY, MALLORY):
        run(daemon, uid, "train", "echo", f"of {uid}")
        wait_state(daemon, "train", "dead")
        assert ask_as(uid, daemon.socket, "kill", name="train")["ok"]
    owners = {path.read_text(): path.stat().st_uid for path in daemon.log_dir.glob("train.log*")}
    assert owners == {f"of {ALICE}\n": ALICE, f"of {MALLORY}\n": MALLORY}


# -- root's own programs --------------------------------------------------------------------------


def test_rescue_does_not_trust_the_environment_of_its_target(folder: Path) -> None:
    """The simulated driver tidies its directory up: removes, truncates and writes files, here as root."""
    precious = folder / "precious" / "20240101-120000"
    precious.mkdir(parents=True)
    (precious / "backup").write_text("precious")
    trap = folder / "trap"
    (trap / "procs").mkdir(parents=True)
    (trap / "saved").symlink_to(folder / "precious")
    (trap / "capacity.lock").touch()
    (trap / "gpus.json").write_text('{"gpus": []}')
    (trap / "script.json").write_text(json.dumps([{"call": "usage"}]))
    (trap / "script-counts.new").symlink_to(folder / "written")
    for path in (trap, *trap.iterdir()):
        os.chown(path, MALLORY, MALLORY, follow_symlinks=False)
    program = subprocess.Popen(
        SLEEP, user=MALLORY, group=MALLORY, env={"PATH": "/bin", "GPUSCHED_SIM_DIR": str(trap)}
    )
    try:
        with pytest.raises(errors.PermissionDenied, match="which no daemon of uid 0 made"):
            rescue(program.pid)
    finally:
        program.kill()
        program.wait()
    assert (precious / "backup").read_text() == "precious"
    assert not (folder / "written").exists()


def start_daemon(path: Path, state: Path, logs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpusched", "-s", str(path), "daemon", "--backend", "sim"]
    command += ["--state-dir", str(state), "--log-dir", str(logs)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nobody_keeps_roots_daemon_from_its_socket(folder: Path, kind: str) -> None:
    sticky = folder / "tmp"
    sticky.mkdir()
    sticky.chmod(0o1777)
    path = sticky / "s"
    run_as(MALLORY, ["mkdir" if kind == "directory" else "touch", str(path)])
    assert path.stat().st_uid == MALLORY
    program = start_daemon(path, folder / "state", folder / "logs")
    try:
        wait_until(
            lambda: path.is_socket() or program.poll() is not None, within_s=20, what="it is up"
        )
        assert program.poll() is None, program.communicate()[1]
        assert ask_as(MALLORY, str(path), "status")["ok"]
        (aside,) = sticky.glob(f"s.of-uid-{MALLORY}-*")  # what was hers is still there
        assert aside.stat().st_uid == MALLORY
    finally:
        program.terminate()
        program.communicate(timeout=20)
    assert not path.exists()


@pytest.mark.parametrize("which", ["state", "logs"])
def test_a_directory_of_somebody_elses_is_refused(folder: Path, which: str) -> None:
    (folder / which).mkdir()
    os.chown(folder / which, MALLORY, MALLORY)
    program = start_daemon(folder / "s", folder / "state", folder / "logs")
    try:
        _, text = program.communicate(timeout=20)
    finally:
        program.kill()
    assert program.returncode == 6 and "belongs to another user" in text and "Traceback" not in text


def test_a_state_directory_that_others_could_enter_is_closed(folder: Path) -> None:
    (folder / "state").mkdir(mode=0o777)
    (folder / "state").chmod(0o777)
    program = start_daemon(folder / "s", folder / "state", folder / "logs")
    try:
        wait_until((folder / "s").exists, within_s=20, what="it is up")
        assert (folder / "state").stat().st_mode & 0o777 == 0o700
    finally:
        program.terminate()
        program.communicate(timeout=20)


def test_the_daemon_is_as_it_was(daemon: PrivateDaemon) -> None:
    """Runs last: all attacks above are behind it."""
    assert find(daemon, "x") is None
    run(daemon, ALICE, "x", *SLEEP)
