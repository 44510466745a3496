"""The daemon is root, and other users are not: every check with real uids.

Alice owns a process and its log; Mallory has an account too, and tries everything.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, request, wait_until
from gpusched import GpuSched, errors
from gpusched.daemon import sim_directory
from live import (
    ALICE,
    MALLORY,
    SLEEP,
    STAFF,
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
    prove_contents,
    run_as,
    running,
    start,
    state,
    wait_ready,
    wait_state,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running(gpus=2, vram="64M") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def alices(daemon: PrivateDaemon) -> str:
    """Alice's workload, ready, with one line of its own in the log."""
    answer = ask_as(ALICE, daemon.socket, "run", name="alices", **others_workload("8M"))
    assert answer["ok"], answer
    wait_ready(daemon, "alices")
    return "alices"


@pytest.fixture(autouse=True)
def only_alices_is_left(daemon: PrivateDaemon) -> Iterator[None]:
    yield
    for found in ask(daemon, "status")["processes"]:
        if found["name"] != "alices":
            ask(daemon, "kill", name=found["name"], force=True)


def denied(daemon: PrivateDaemon, method: str, **params: Any) -> dict[str, Any]:
    answer = ask_as(MALLORY, daemon.socket, method, **params)
    assert not answer["ok"] and answer["code"] == "permission_denied", answer
    return answer


# -- another user -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("freeze", {}),
        ("freeze", {"force": True}),
        ("thaw", {}),
        ("thaw", {"evict": True}),
        ("kill", {"force": True}),
        ("migrate", {"gpu": 1}),
        ("acquire", {}),
        ("acquire", {"for_s": 1000, "evict": True}),
        ("release", {}),
        ("logs", {}),
        ("logs", {"follow": True}),
        ("hibernate", {}),
        ("fork", {"copies": 2}),
        ("verify_snapshot", {}),
        ("delete_snapshot", {}),
    ],
)
def test_another_user_may_do_nothing_with_it(
    daemon: PrivateDaemon, alices: str, method: str, params: dict[str, Any]
) -> None:
    before = process(daemon, alices)
    denied(daemon, method, name=alices, **params)
    after = process(daemon, alices)
    for key in ("pid", "state", "leases", "gpu", "mem_mb"):
        assert after[key] == before[key]


def test_another_user_cannot_swap_it_against_their_own(daemon: PrivateDaemon, alices: str) -> None:
    assert ask_as(MALLORY, daemon.socket, "run", name="hers", cmd=SLEEP, dir="/")["ok"]
    denied(daemon, "swap", off=alices, on="hers")
    denied(daemon, "swap", off="hers", on=alices)
    denied(daemon, "swap", off=["hers", alices], on=["hers"])
    assert (state(daemon, alices), state(daemon, "hers")) == ("active", "active")


def test_another_users_dead_entry_keeps_its_name(daemon: PrivateDaemon) -> None:
    assert ask_as(ALICE, daemon.socket, "run", name="late", cmd=["true"], dir="/")["ok"]
    wait_state(daemon, "late", "dead")
    denied(daemon, "run", name="late", cmd=["true"])
    denied(daemon, "kill", name="late")
    assert ask_as(ALICE, daemon.socket, "run", name="late", cmd=["true"], dir="/")["ok"]


def test_another_users_process_cannot_be_adopted(daemon: PrivateDaemon) -> None:
    program = subprocess.Popen(SLEEP, user=ALICE, group=ALICE)
    try:
        denied(daemon, "adopt", pid=program.pid, name="mine")
        denied(daemon, "adopt", pid=os.getpid(), name="mine")
        denied(daemon, "adopt", pid=1, name="mine")
        denied(daemon, "adopt", pid=daemon.pid, name="mine")
        assert find(daemon, "mine") is None
        assert ask_as(ALICE, daemon.socket, "adopt", pid=program.pid, name="own")["ok"]
        denied(daemon, "freeze", name="own")
    finally:
        program.kill()
        program.wait()


def test_files_cannot_be_read_by_another_user(daemon: PrivateDaemon, alices: str) -> None:
    log = daemon.log_dir / f"{alices}.log"
    assert run_as(ALICE, ["cat", str(log)]).returncode == 0
    for path in (log, daemon.state_dir, daemon.state_dir / "journal", daemon.state_dir / "trees"):
        for command in (["cat", str(path)], ["ls", str(path)]):
            if command[0] == "ls" and path == log:
                continue  # a name is no secret
            done = run_as(MALLORY, command)
            assert done.returncode != 0 and not done.stdout, (command, done.stdout)
    assert run_as(MALLORY, ["ls", str(daemon.log_dir)]).returncode != 0
    for folder in (daemon.log_dir, daemon.state_dir, daemon.sim_dir, daemon.sim_dir / "saved"):
        assert run_as(MALLORY, ["touch", str(folder / "new")]).returncode != 0


def test_owners_and_modes_of_files(daemon: PrivateDaemon, alices: str) -> None:
    def found(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_uid, stat.S_IMODE(status.st_mode)

    assert found(daemon.log_dir / f"{alices}.log") == (ALICE, 0o600)
    assert found(daemon.log_dir) == (0, 0o711)
    assert found(daemon.state_dir) == (0, 0o700)
    for path in daemon.state_dir.rglob("*"):
        assert found(path) == (0, 0o700 if path.is_dir() else 0o600), path
    assert found(Path(daemon.socket)) == (0, 0o666)


def test_a_process_runs_as_its_caller_and_no_more(daemon: PrivateDaemon) -> None:
    script = "id -u; id -g; id -G; grep -E '^(Cap(Prm|Eff|Inh|Amb)|Groups)' /proc/self/status; ls /proc/self/fd"
    answer = ask_as(
        MALLORY, daemon.socket, "run", name="who", cmd=["sh", "-c", script], dir="/", groups=[STAFF]
    )
    assert answer["ok"], answer
    wait_state(daemon, "who", "dead")
    lines = ask_as(MALLORY, daemon.socket, "logs", name="who")["result"]["lines"]
    assert lines[:2] == [str(MALLORY), str(MALLORY)]
    assert "0" not in lines[2].split()
    capabilities = [line.split()[1] for line in lines if line.startswith("Cap")]
    assert capabilities == ["0000000000000000"] * 4
    assert lines[-4:] == ["0", "1", "2", "3"]  # 3 is the directory that ls reads
    assert process(daemon, "who")["uid"] == MALLORY


@pytest.mark.parametrize(
    "params", [{"uid": 0}, {"user": "root"}, {"gid": 0}, {"caller": {"uid": 0}}]
)
def test_who_one_is_cannot_be_said(daemon: PrivateDaemon, params: dict[str, Any]) -> None:
    answer = ask_as(MALLORY, daemon.socket, "run", name="who", cmd=["id", "-u"], dir="/", **params)
    assert answer["ok"], answer
    wait_state(daemon, "who", "dead")
    assert ask(daemon, "logs", name="who")["lines"] == [str(MALLORY)]


def test_a_directory_that_the_caller_may_not_enter_is_refused(
    daemon: PrivateDaemon, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    answer = ask_as(MALLORY, daemon.socket, "run", name="x", cmd=["true"], dir=str(tmp_path))
    assert answer["code"] == "invalid_request" and "permission denied" in answer["error"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", ".", "..", "-x", "a\0", "a b", "a\n", "ä", "x.log/../y"]
)
def test_a_name_never_leads_out_of_the_log_directory(daemon: PrivateDaemon, name: str) -> None:
    answer = ask_as(MALLORY, daemon.socket, "run", name=name, cmd=["true"], dir="/")
    assert answer["code"] == "invalid_request", answer


@pytest.mark.parametrize(
    "env", [{"LD_PRELOAD": "/tmp/evil.so"}, {"PYTHONSTARTUP": "/tmp/evil"}, {"PATH": "/tmp"}]
)
def test_a_hostile_environment_reaches_its_own_process_only(
    daemon: PrivateDaemon, env: dict[str, str]
) -> None:
    params: dict[str, Any] = {"name": "x", "cmd": ["/usr/bin/env"], "env": env, "dir": "/"}
    assert ask_as(MALLORY, daemon.socket, "run", **params)["ok"]
    wait_state(daemon, "x", "dead")
    supervisor_free = [p for p in children(daemon.pid) if is_alive(p)]
    for pid in [daemon.pid, *supervisor_free]:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        assert not any(f"{key}={value}" in entries for key, value in env.items())


# -- descendants of another user ------------------------------------------------------------------


@pytest.fixture
def become_root(tmp_path: Path) -> Iterator[str]:
    """A set-uid program that starts its arguments as root: what su and sudo are."""
    program = shutil.which("setpriv")
    folder = Path("/tmp") / f"gs-suid-{os.getpid()}"
    if program is None or os.statvfs("/tmp").f_flag & os.ST_NOSUID:
        pytest.skip("needs setpriv and a /tmp where set-uid programs work")
    folder.mkdir(mode=0o755)
    shutil.copy(program, folder / "become")
    (folder / "become").chmod(0o4755)
    yield str(folder / "become")
    shutil.rmtree(folder)


def test_a_set_uid_descendant_is_not_stopped(daemon: PrivateDaemon, become_root: str) -> None:
    script = f"{become_root} --reuid 0 sleep 1000 & echo up; wait"
    answer = ask_as(MALLORY, daemon.socket, "run", name="x", cmd=["sh", "-c", script], dir="/")
    pid = answer["result"]["pid"]

    def roots() -> list[int]:
        return [p for p in children(pid) if "\nUid:\t0\t0" in Path(f"/proc/{p}/status").read_text()]

    wait_until(roots, within_s=10, what="a descendant is root's")
    foreign = roots()[0]
    denied_text = denied(daemon, "freeze", name="x")["error"]
    assert f"pid {foreign}" in denied_text
    assert not is_stopped(foreign) and not is_stopped(pid)
    assert state(daemon, "x") == "active"
    os.kill(foreign, 9)  # nobody else will
    own = subprocess.Popen(["sh", "-c", script], user=MALLORY, group=MALLORY, cwd="/")
    try:
        wait_until(
            lambda: any(
                "\nUid:\t0\t0" in Path(f"/proc/{p}/status").read_text() for p in children(own.pid)
            ),
            within_s=10,
            what="a descendant is root's",
        )
        denied(daemon, "adopt", pid=own.pid, name="y")
    finally:
        for each in [*children(own.pid), own.pid]:
            os.kill(each, 9)
        own.wait()


# -- the configured group -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_group() -> Iterator[PrivateDaemon]:
    with running(args=["--group", "games"]) as daemon:
        yield daemon


def test_members_of_the_group_may_do_all(with_group: PrivateDaemon) -> None:
    gid = grp.getgrnam("games").gr_gid
    path = with_group.socket
    assert ask_as(ALICE, path, "run", name="x", cmd=SLEEP, dir="/")["ok"]
    assert ask_as(MALLORY, path, "freeze", name="x")["code"] == "permission_denied"
    many = [*range(20_000, 20_300), gid]
    for groups in ([gid], [STAFF, gid], many):  # more than 256 too
        assert ask_as(MALLORY, path, "freeze", name="x", groups=groups)["ok"]
        assert ask_as(MALLORY, path, "thaw", name="x", groups=groups)["ok"]
    assert ask_as(MALLORY, path, "freeze", name="x", groups=[STAFF])["code"] == "permission_denied"
    # A member acts on others' processes, but what they run is their own.
    answer = ask_as(MALLORY, path, "run", name="y", cmd=["id", "-u"], dir="/", groups=[gid])
    assert answer["ok"]
    wait_state(with_group, "y", "dead")
    assert ask(with_group, "logs", name="y")["lines"] == [str(MALLORY)]


def test_a_group_that_is_not_there_is_an_error_at_the_start() -> None:
    daemon = PrivateDaemon(gpus=1, vram="8M", args=["--group", "no-such-group"])
    try:
        with pytest.raises(AssertionError, match="there is no group 'no-such-group'"):
            daemon.start()
        assert daemon.returncode == 3
    finally:
        daemon.kill9()
        shutil.rmtree(daemon.directory)
        shutil.rmtree(daemon.sim_dir, ignore_errors=True)


# -- the socket -----------------------------------------------------------------------------------

_SQUAT = """
import socket, sys, time
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("listening", flush=True)
connection, _ = server.accept()
print(connection.recv(65536) or "nothing", flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def squatter(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Mallory listens at ``path`` and says what she gets."""
    program = subprocess.Popen(
        [others_python(), "-I", "-S", "-c", _SQUAT, str(path)],
        user=MALLORY,
        group=MALLORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "listening\n"
        yield program
    finally:
        program.kill()
        program.communicate()


@pytest.fixture
def sticky() -> Iterator[Path]:
    """A directory like /tmp."""
    path = Path("/tmp") / f"gs-sticky-{os.getpid()}"
    path.mkdir()
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def test_the_sdk_sends_nothing_to_another_users_socket(sticky: Path) -> None:
    with squatter(sticky / "s") as program:
        with pytest.raises(errors.PermissionDenied, match=f"uid {MALLORY}"):
            GpuSched(sticky / "s").run("x", ["true"], env={"TOKEN": "secret"})
        assert program.stdout is not None
        assert program.stdout.readline() == "nothing\n"


@contextlib.contextmanager
def daemon_at(path: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A daemon of root's at ``path``; whether it comes up is for the test to see."""
    program = subprocess.Popen(
        [
            *(sys.executable, "-m", "gpusched", "-s", str(path), "daemon", "--backend", "sim"),
            *("--state-dir", str(folder / "state"), "--log-dir", str(folder / "log")),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield program
    finally:
        program.terminate()
        program.communicate(timeout=20)
        shutil.rmtree(sim_directory(folder / "state"), ignore_errors=True)


def test_a_squatted_path_is_taken_back_by_root(sticky: Path, tmp_path: Path) -> None:
    path = sticky / "s"
    with squatter(path), daemon_at(path, tmp_path):
        wait_until(
            lambda: path.exists() and path.stat().st_uid == 0, within_s=20, what="it is root's"
        )
        assert ask_as(MALLORY, str(path), "status")["ok"]
        assert run_as(MALLORY, ["rm", "-f", str(path)]).returncode != 0


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file"])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path, precious = tmp_path / "s", tmp_path / "precious"
    precious.write_text("precious")
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to(precious)
    with daemon_at(path, tmp_path) as program:
        if kind == "link to a file":  # the link goes, what it names stays
            wait_until(
                lambda: path.is_socket() and not path.is_symlink(), within_s=20, what="it is up"
            )
        else:
            _, text = program.communicate(timeout=20)
            assert program.returncode == 6 and "is not a socket" in text and "Traceback" not in text
            assert path.exists()
        assert precious.read_text() == "precious"


_HOLD = """
import json, socket, sys
held = []
answer = b""
while not answer:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(sys.argv[1])
    connection.sendall(b'{"method":"status"}\\n')
    line = connection.makefile().readline()
    if json.loads(line)["ok"]:
        held.append(connection)
    else:
        answer = line
print(len(held), answer)
"""


def test_one_user_cannot_take_all_connections(daemon: PrivateDaemon) -> None:
    done = run_as(MALLORY, [others_python(), "-I", "-S", "-c", _HOLD, daemon.socket])
    count, _, answer = done.stdout.partition(" ")
    assert (int(count), json.loads(answer)["code"]) == (256, "unavailable"), done.stderr
    assert ask_as(MALLORY, daemon.socket, "status")["ok"]  # all of hers are closed again
    with contextlib.ExitStack() as lines:  # root may have more
        for _ in range(300):
            lines.enter_context(Line(daemon.socket))
        assert request(daemon.socket, "status")["ok"]


# -- a daemon of an ordinary user's own -----------------------------------------------------------


@pytest.fixture
def own_daemon() -> Iterator[Path]:
    """The directory of a daemon that Alice started herself; its socket is ``s``."""
    directory = Path("/tmp") / f"gs-own-{os.getpid()}"
    directory.mkdir(mode=0o755)
    os.chown(directory, ALICE, ALICE)
    command = [
        *(others_python(), "-m", "gpusched", "-s", str(directory / "s"), "daemon"),
        *("--backend", "sim", "--sim-gpus", "1", "--sim-vram", "64M"),
        *("--state-dir", str(directory / "state"), "--log-dir", str(directory / "log")),
    ]
    with (directory / "daemon.log").open("wb") as log:
        program = subprocess.Popen(
            command,
            user=ALICE,
            group=ALICE,
            extra_groups=[],
            env=others_env() | {"HOME": str(directory)},
            cwd="/",
            stdout=log,
            stderr=log,
        )
    try:
        wait_until((directory / "s").exists, within_s=20, what="Alice's daemon is up")
        yield directory
    finally:
        program.terminate()
        assert program.wait(20) == 0, (directory / "daemon.log").read_text()
        shutil.rmtree(directory)
        for path in Path("/dev/shm").glob(f"gpusched-sim-{ALICE}-*"):
            shutil.rmtree(path)


def test_an_ordinary_user_has_a_daemon_of_their_own(own_daemon: Path) -> None:
    path = str(own_daemon / "s")

    def alice(method: str, **params: Any) -> Any:
        answer = ask_as(ALICE, path, method, **params)
        assert answer["ok"], answer
        return answer["result"]

    alice("run", name="x", **others_workload("8M"))
    wait_until(lambda: alice("logs", name="x")["lines"], within_s=30, what="it is ready")
    assert alice("freeze", name="x")["mem_mb"] == 8
    assert alice("thaw", name="x")["mem_mb"] == 8
    before = len(alice("logs", name="x", lines=-1)["lines"])
    wait_until(
        lambda: len(alice("logs", name="x", lines=-1)["lines"]) > before, within_s=10, what="a tick"
    )
    found = alice("status")["processes"][0]
    assert (found["state"], found["uid"]) == ("active", ALICE)
    assert ask_as(MALLORY, path, "freeze", name="x")["code"] == "permission_denied"
    # Nobody else can be served: the daemon could not become them.
    answer = ask_as(MALLORY, path, "run", name="y", cmd=["true"], dir="/")
    assert answer["code"] == "permission_denied", answer
    assert ask_as(MALLORY, path, "status")["ok"]
    alice("kill", name="x")


def test_alices_process_was_never_touched(daemon: PrivateDaemon, alices: str) -> None:
    """Runs last: all attempts above are behind it."""
    prove_contents(daemon, alices)


def test_a_users_frozen_processes_keep_to_that_users_share_of_host_ram(
    private_daemon: StartDaemon, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text('user_ram_budget = "20M"\n')
    daemon = private_daemon(gpus=2, vram="64M", args=["--config", str(config)])
    for name in ("first", "second", "third"):
        answer = ask_as(
            ALICE, daemon.socket, "run", name=name, evictable=True, **others_workload("8M")
        )
        assert answer["ok"], answer
        wait_ready(daemon, name)
    start(daemon, "roots", "24M")
    for name in ("first", "second"):
        ask(daemon, "freeze", name=name)
    # What does not stay in host RAM is not charged.
    ask(daemon, "migrate", name="third", gpu=1)
    ask(daemon, "migrate", name="third", gpu=0)
    ask(daemon, "swap", off="third", on="first")
    ask(daemon, "swap", off="first", on="third")
    for asking in (0, ALICE):  # whose it is counts, not who asks
        answer = ask_as(asking, daemon.socket, "freeze", name="third")
        assert answer["code"] == "insufficient_host_memory", answer
        assert "uid 65534 has 16 MiB of its 20 MiB (user_ram_budget)" in answer["error"]
    prove_contents(daemon, "third")
    ask(daemon, "freeze", name="roots")
    for name in ("first", "second"):
        ask(daemon, "thaw", name=name)
    # Several at once are not less.
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(request, daemon.socket, "freeze", name=name)
            for name in ("first", "second", "third")
        ]
        assert sorted(one.result(30)["ok"] for one in asked) == [False, True, True]
    for name in ("first", "second", "third"):
        ask(daemon, "thaw", name=name)
    for name in ("second", "third"):
        ask(daemon, "freeze", name=name)
    # Who is in somebody else's way goes all the same.
    start(daemon, "large", "40M")
    assert ask(daemon, "thaw", name="roots", evict=True)["evicted"] == ["first"]
    assert state(daemon, "first") == "frozen"
