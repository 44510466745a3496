"""Managed processes from start to end: environment, trees, adoption, several GPUs, exits and kills."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daemons import PrivateDaemon, request, wait_until
from gpusched.config import PASSED_ON
from gpusched.mechanisms.sim.driver import SimDriver
from live import (
    ask,
    children,
    digests,
    driver_state,
    error_of,
    find,
    is_alive,
    is_stopped,
    log_lines,
    process,
    prove_contents,
    start,
    state,
    wait_state,
    workload,
)

GRACE_S = 0.6
#: Against NVLink multicast, set for the daemon.
OPERATORS = dict(zip(PASSED_ON, ("0", "1", "1"), strict=True))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text(f'kill_grace = "{GRACE_S}s"\n')
    daemon = PrivateDaemon(
        gpus=2,
        vram="64M",
        args=["--config", str(config)],
        env={"DAEMONS_OWN": "secret", **OPERATORS},
    )
    daemon.start()
    yield daemon
    daemon.end()


@pytest.fixture(autouse=True)
def none_left(daemon: PrivateDaemon) -> Iterator[None]:
    yield
    for found in ask(daemon, "status")["processes"]:
        ask(daemon, "kill", name=found["name"], force=True)


def uuids(daemon: PrivateDaemon) -> list[str]:
    return [gpu["uuid"] for gpu in ask(daemon, "status")["gpus"]]


def used_mb(daemon: PrivateDaemon) -> list[int]:
    return [gpu["mem_used_mb"] for gpu in ask(daemon, "status")["gpus"]]


def environment_of(daemon: PrivateDaemon, **params: Any) -> dict[str, str]:
    """The environment and the directory that a process gets, as it sees them itself."""
    ask(daemon, "run", name="env", cmd=["/bin/sh", "-c", "env; echo cwd=$(pwd -P)"], **params)
    wait_state(daemon, "env", "dead")
    found = dict(line.split("=", 1) for line in log_lines(daemon, "env"))
    ask(daemon, "kill", name="env")
    return found


# -- the start ------------------------------------------------------------------------------------


def test_without_an_environment_a_process_gets_a_logins(daemon: PrivateDaemon) -> None:
    me = pwd.getpwuid(os.geteuid())
    env = environment_of(daemon)
    assert (env["HOME"], env["USER"], env["SHELL"]) == (me.pw_dir, me.pw_name, me.pw_shell)
    assert env["LOGNAME"] == me.pw_name
    assert "/usr/bin" in env["PATH"].split(":")
    assert env["cwd"] == str(Path(me.pw_dir).resolve())
    assert "DAEMONS_OWN" not in env


def test_the_callers_environment_and_directory_are_kept(
    daemon: PrivateDaemon, tmp_path: Path
) -> None:
    sent = {"PATH": "/usr/bin:/bin", "A": "1 = 2", "EMPTY": ""}
    env = environment_of(daemon, env=sent, dir=str(tmp_path))
    assert env["cwd"] == str(tmp_path.resolve())
    assert {key: env[key] for key in sent} == sent
    assert "HOME" not in env and "DAEMONS_OWN" not in env


def test_ours_goes_over_the_callers_environment(daemon: PrivateDaemon) -> None:
    hostile = {
        "PATH": "/usr/bin:/bin",
        "CUDA_VISIBLE_DEVICES": "7",
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
        "GPUSCHED_MANAGED": "0",
    }
    all_gpus = uuids(daemon)
    env = environment_of(daemon, env=hostile, gpu=1)
    assert env["CUDA_VISIBLE_DEVICES"] == all_gpus[1]
    assert (env["CUDA_DEVICE_ORDER"], env["GPUSCHED_MANAGED"]) == ("PCI_BUS_ID", "1")
    env = environment_of(daemon, env=hostile, gpus=[1, 0])
    assert env["CUDA_VISIBLE_DEVICES"] == f"{all_gpus[1]},{all_gpus[0]}"


def test_an_operators_variables_are_handed_on_whatever_the_caller_sends(
    daemon: PrivateDaemon,
) -> None:
    assert OPERATORS.items() <= environment_of(daemon).items()
    own = {"PATH": "/usr/bin:/bin", "NCCL_NVLS_ENABLE": "1"}
    env = environment_of(daemon, env=own)
    assert {name: env[name] for name in OPERATORS} == {**OPERATORS, "NCCL_NVLS_ENABLE": "1"}


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"cmd": ["/no/such"]}, "cannot execute"),
        ({"cmd": ["no-such-program"]}, "looked in PATH="),
        ({"cmd": ["/etc/passwd"]}, "permission denied"),
        ({"cmd": ["true"], "dir": "/no/such"}, "cannot work in directory"),
        ({"cmd": ["true"], "dir": "/etc/passwd"}, "cannot work in directory"),
        ({"cmd": ["true"], "env": {"A": "x" * 200_000}}, "cannot execute"),
        ({"cmd": ["true", "a\0b"]}, "NUL"),
        ({"cmd": ["true"], "gpu": 5}, "no GPU 5; there are GPUs 0, 1"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_no_name(
    daemon: PrivateDaemon, params: dict[str, Any], text: str
) -> None:
    answer = error_of(daemon, "run", name="job", **params)
    assert answer["code"] == "invalid_request" and text in answer["error"], answer
    assert find(daemon, "job") is None


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code", "number"),
    [("exit 0", 0, None), ("exit 3", 3, None), ("kill -SEGV $$", None, signal.SIGSEGV)],
)
def test_how_it_ended_is_known(
    daemon: PrivateDaemon, script: str, code: int | None, number: int | None
) -> None:
    ask(daemon, "run", name="job", cmd=["sh", "-c", f"echo bye; {script}"])
    wait_state(daemon, "job", "dead")
    found = process(daemon, "job")
    assert (found["exit_code"], found["exit_signal"]) == (code, number)
    assert (found["mem_mb"], found["tier"]) == (0, "gpu")
    assert log_lines(daemon, "job") == ["bye"]
    for method in ("freeze", "thaw", "acquire", "migrate"):
        extra = {"gpu": 1} if method == "migrate" else {}
        assert error_of(daemon, method, name="job", **extra)["code"] == "process_exited"
    exits = [e for e in ask(daemon, "status")["recent_events"] if e["type"] == "exit"]
    assert exits[-1]["process"] == "job"


def test_a_dead_entry_keeps_its_name_until_kill_or_the_next_run(daemon: PrivateDaemon) -> None:
    ask(daemon, "run", name="job", cmd=["true"])
    wait_state(daemon, "job", "dead")
    ask(daemon, "run", name="job", cmd=["sh", "-c", "echo second; exec sleep 1000"])
    assert state(daemon, "job") == "active"
    assert error_of(daemon, "run", name="job", cmd=["true"])["code"] == "already_exists"
    ask(daemon, "kill", name="job")
    ask(daemon, "run", name="job", cmd=["true"])
    wait_state(daemon, "job", "dead")
    assert ask(daemon, "kill", name="job") == {"name": "job"}
    assert find(daemon, "job") is None


def test_kill_asks_first(daemon: PrivateDaemon, tmp_path: Path) -> None:
    script = (
        f"trap 'echo saved > {tmp_path}/saved; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    )
    pid = ask(daemon, "run", name="job", cmd=["sh", "-c", script])["pid"]
    wait_until(lambda: log_lines(daemon, "job"), within_s=10, what="it is up")
    ask(daemon, "kill", name="job")
    assert not is_alive(pid)
    assert (tmp_path / "saved").read_text() == "saved\n"


def test_kill_insists_after_the_grace_period(daemon: PrivateDaemon) -> None:
    script = "trap '' TERM; echo up; while :; do sleep 0.01; done"
    pid = ask(daemon, "run", name="job", cmd=["sh", "-c", script])["pid"]
    wait_until(lambda: log_lines(daemon, "job"), within_s=10, what="it is up")
    begun = time.monotonic()
    ask(daemon, "kill", name="job")
    assert GRACE_S * 0.9 < time.monotonic() - begun < GRACE_S + 5
    assert not is_alive(pid)


def test_a_frozen_process_is_killed_at_once_and_its_memory_is_free(daemon: PrivateDaemon) -> None:
    pid = start(daemon, "job")
    ask(daemon, "freeze", name="job")
    assert ask(daemon, "status")["memory"]["snapshots_mb"] == 8
    ask(daemon, "kill", name="job")
    assert not is_alive(pid)
    assert ask(daemon, "status")["memory"]["snapshots_mb"] == 0
    assert used_mb(daemon) == [0, 0]


def test_kill_ends_the_whole_tree(daemon: PrivateDaemon) -> None:
    pids = family(daemon)
    ask(daemon, "kill", name="job")
    assert not [pid for pid in pids if is_alive(pid)]


# -- trees ----------------------------------------------------------------------------------------

#: A child, a child in a session of its own, and one whose parent ended: three ways to be hard to find.
_FAMILY = "sleep 1000 & setsid sleep 1000 & (setsid sleep 1000 &) ; echo up; wait"


def family(daemon: PrivateDaemon, name: str = "job") -> list[int]:
    """Runs a shell with three descendants; all four pids."""
    pid = ask(daemon, "run", name=name, cmd=["sh", "-c", _FAMILY])["pid"]

    def sleepers() -> list[int]:
        found = [p for p in descendants_of_supervisor(pid) if p != pid]
        return [p for p in found if comm(p) == "sleep"]  # shells and setsid come and go

    wait_until(lambda: len(sleepers()) == 3, within_s=10, what="three descendants")
    return [pid, *sleepers()]


def comm(pid: int) -> str:
    """The program's name; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def descendants_of_supervisor(pid: int) -> list[int]:
    """Everything below the parent of a managed process, which also adopts its orphans."""
    found = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])]
    for each in found:
        with contextlib.suppress(OSError):  # it has just ended
            found += children(each)
    return found[1:]


def test_freeze_stops_every_descendant_and_thaw_continues_them(daemon: PrivateDaemon) -> None:
    pids = family(daemon)
    result = ask(daemon, "freeze", name="job")
    assert (result["mem_mb"], result["tier"]) == (0, "ram")  # no CUDA state: stopped, nothing moved
    assert all(is_stopped(pid) for pid in pids)
    assert ask(daemon, "thaw", name="job")["mem_mb"] == 0
    assert not any(is_stopped(pid) for pid in pids)


def test_a_tree_of_gpu_processes_moves_as_one(daemon: PrivateDaemon) -> None:
    one = " ".join(workload("8M"))
    script = f"{one} --seed 1 & setsid {one} --seed 2 & (exec {one} --seed 3 &); wait"
    ask(daemon, "run", name="job", cmd=["sh", "-c", script])

    def ready() -> list[str]:
        return [line for line in log_lines(daemon, "job") if "ready" in line]

    wait_until(lambda: len(ready()) == 3, within_s=30, what="three are ready")
    assert process(daemon, "job")["mem_mb"] == 24
    for _ in range(3):
        assert ask(daemon, "freeze", name="job")["mem_mb"] == 24
        assert used_mb(daemon) == [0, 0]
        assert ask(daemon, "thaw", name="job")["mem_mb"] == 24
        assert used_mb(daemon) == [24, 0]
    ticks = len(digests(daemon, "job"))
    wait_until(lambda: len(digests(daemon, "job")) > ticks + 6, within_s=20, what="all tick on")
    assert len(set(digests(daemon, "job"))) == 3
    assert "corrupt" not in "\n".join(log_lines(daemon, "job"))


# -- adoption -------------------------------------------------------------------------------------


@pytest.fixture
def stranger(daemon: PrivateDaemon, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A workload that somebody else started; ready."""
    log = tmp_path / "log"
    with log.open("wb") as output:
        program = subprocess.Popen(
            workload("8M"),
            stdout=output,
            env={**os.environ, "GPUSCHED_SIM_DIR": str(daemon.sim_dir)},
        )
    wait_until(lambda: "ready" in log.read_text(), within_s=30, what="the workload is ready")
    yield program
    program.kill()
    program.wait()


def test_an_adopted_process_is_managed(
    daemon: PrivateDaemon, stranger: subprocess.Popen[bytes]
) -> None:
    result = ask(daemon, "adopt", pid=stranger.pid, name="job")
    assert (result["name"], result["pid"], result["mem_mb"]) == ("job", stranger.pid, 8)
    found = process(daemon, "job")
    assert (found["state"], found["adopted"], found["gpus"]) == ("active", True, [0])
    assert error_of(daemon, "logs", name="job")["code"] == "not_found"
    assert ask(daemon, "freeze", name="job")["mem_mb"] == 8
    assert is_stopped(stranger.pid)
    assert ask(daemon, "thaw", name="job")["mem_mb"] == 8
    assert not is_stopped(stranger.pid)
    ask(daemon, "kill", name="job")
    assert stranger.wait(10) == -signal.SIGTERM


def test_a_process_has_one_owner(daemon: PrivateDaemon, stranger: subprocess.Popen[bytes]) -> None:
    ask(daemon, "adopt", pid=stranger.pid, name="job")
    assert error_of(daemon, "adopt", pid=stranger.pid, name="again")["code"] == "already_exists"
    for pid in family(daemon, "tree"):  # not a part of a tree either
        answer = error_of(daemon, "adopt", pid=pid, name="again")
        assert answer["code"] == "already_exists", answer
    assert find(daemon, "again") is None


def test_one_of_two_adoptions_at_once_wins(
    daemon: PrivateDaemon, stranger: subprocess.Popen[bytes]
) -> None:
    def adopt(name: str) -> str:
        answer = request(daemon.socket, "adopt", pid=stranger.pid, name=name)
        return "ok" if answer["ok"] else str(answer["code"])

    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(adopt, ["a", "b", "c", "d"]))
    assert sorted(codes) == ["already_exists"] * 3 + ["ok"]


def test_adoption_takes_descendants_too(daemon: PrivateDaemon) -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000 & wait"])
    try:
        wait_until(lambda: len(children(shell.pid)) == 2, within_s=10, what="two children")
        pids = [shell.pid, *children(shell.pid)]
        ask(daemon, "adopt", pid=shell.pid, name="job")
        ask(daemon, "freeze", name="job")
        assert all(is_stopped(pid) for pid in pids)
        ask(daemon, "kill", name="job")
        assert shell.wait(10) == -signal.SIGKILL  # it was frozen
        assert not [pid for pid in pids if is_alive(pid)]
    finally:
        shell.kill()
        shell.wait()


def test_what_was_frozen_by_somebody_gone_is_adopted_frozen(
    daemon: PrivateDaemon, stranger: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    driver = SimDriver(daemon.sim_dir)
    driver.lock(stranger.pid, 5.0)
    driver.checkpoint(stranger.pid)
    os.kill(stranger.pid, signal.SIGSTOP)
    ask(daemon, "adopt", pid=stranger.pid, name="job")
    assert state(daemon, "job") == "frozen"
    assert ask(daemon, "thaw", name="job")["from_tier"] == "ram"
    assert driver_state(daemon, stranger.pid) == "running"
    before = (tmp_path / "log").read_text().count("tick")
    wait_until(
        lambda: (tmp_path / "log").read_text().count("tick") > before, within_s=10, what="it ticks"
    )
    assert "corrupt" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("which", ["gone", "init", "daemon", "helper", "thread"])
def test_what_cannot_be_adopted(daemon: PrivateDaemon, which: str) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    pid = {
        "gone": gone.pid,
        "init": 1,
        "daemon": daemon.pid,
        "helper": children(daemon.pid)[0],
        "thread": thread.native_id,
    }[which]
    answer = error_of(daemon, "adopt", pid=pid, name="job")
    ended.set()
    thread.join()
    assert answer["code"] in ("not_found", "permission_denied"), answer
    assert find(daemon, "job") is None


# -- several GPUs ---------------------------------------------------------------------------------


def test_a_process_on_two_gpus(daemon: PrivateDaemon) -> None:
    start(daemon, "job", "16M", "--gpu", "0,1", gpus=[0, 1])
    found = process(daemon, "job")
    assert (found["gpu"], found["gpus"], found["mem_mb"]) == (0, [0, 1], 16)
    assert used_mb(daemon) == [8, 8]
    assert ask(daemon, "freeze", name="job")["mem_mb"] == 16
    assert used_mb(daemon) == [0, 0]
    assert ask(daemon, "thaw", name="job")["mem_mb"] == 16
    assert used_mb(daemon) == [8, 8]
    prove_contents(daemon, "job")
    ask(daemon, "migrate", name="job", gpus=[1, 0])
    assert process(daemon, "job")["gpus"] == [1, 0]
    prove_contents(daemon, "job")
    assert error_of(daemon, "migrate", name="job", gpu=0)["code"] == "invalid_request"


@pytest.mark.parametrize("was", ["active", "frozen"])
def test_migration_both_ways(daemon: PrivateDaemon, was: str) -> None:
    start(daemon, "job", "8M")
    for source, target in ((0, 1), (1, 0), (0, 1)):
        if was == "frozen":
            ask(daemon, "freeze", name="job")
        result = ask(daemon, "migrate", name="job", gpu=target)
        assert (result["from_gpu"], result["to_gpu"]) == (source, target)
        found = process(daemon, "job")
        assert (found["state"], found["gpu"], found["mem_mb"]) == ("active", target, 8)
        assert used_mb(daemon)[target] == 8 and used_mb(daemon)[source] == 0
        prove_contents(daemon, "job")
    ask(daemon, "freeze", name="job")
    ask(daemon, "thaw", name="job")
    assert used_mb(daemon) == [0, 8]
    assert ask(daemon, "status")["metrics"]["migrations"] >= 3


def test_migration_to_a_full_gpu_is_refused(daemon: PrivateDaemon) -> None:
    start(daemon, "big", "60M", gpu=1)
    start(daemon, "job", "8M")
    answer = error_of(daemon, "migrate", name="job", gpu=1)
    assert answer["code"] == "insufficient_gpu_memory", answer
    assert (state(daemon, "job"), used_mb(daemon)) == ("active", [8, 60])
    prove_contents(daemon, "job")
