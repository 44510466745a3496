"""Every command of the program against a real daemon: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched.daemon import sim_directory
from gpusched.mechanisms.sim.driver import SimDriver
from live import (
    SLEEP,
    ask,
    digests,
    driver_state,
    find,
    log_lines,
    process,
    prove_contents,
    running,
    start,
    state,
    wait_state,
    workload,
)

PROGRAM = [sys.executable, "-m", "gpusched"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running(gpus=2, vram="24M") as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def none_left(daemon: PrivateDaemon) -> Iterator[None]:
    yield
    for found in ask(daemon, "status")["processes"]:
        ask(daemon, "kill", name=found["name"], force=True)


def environment(daemon: PrivateDaemon) -> dict[str, str]:
    return {**os.environ, "GPUSCHED_SOCKET": daemon.socket}


def call(
    daemon: PrivateDaemon, *arguments: str, code: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The command, run to its end; it must end with ``code``."""
    done = subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=environment(daemon),
        cwd=cwd,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def out(daemon: PrivateDaemon, *arguments: str) -> str:
    done = call(daemon, *arguments)
    assert done.stderr == ""
    return done.stdout


def out_json(daemon: PrivateDaemon, *arguments: str) -> Any:
    return json.loads(out(daemon, *arguments, "--json"))


def matches(pattern: str, text: str) -> None:
    assert re.fullmatch(f"{pattern}( \\[simulated\\])?\n", text), text


def spawn(daemon: PrivateDaemon, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(daemon),
    )


def run_job(daemon: PrivateDaemon, name: str = "job", cmd: Sequence[str] = SLEEP) -> int:
    return int(ask(daemon, "run", name=name, cmd=list(cmd))["pid"])


# -- the printed lines that scripts grep ------------------------------------------------------------


def test_the_life_of_a_process(daemon: PrivateDaemon, tmp_path: Path) -> None:
    text = out(daemon, "run", "-n", "job", "-g", "0", "-d", str(tmp_path), "--", *workload("8M"))
    matches(rf"Started job \(pid={process(daemon, 'job')['pid']}\)", text)
    matches(r"Ready job \(8 MiB\)", out(daemon, "wait", "job"))
    matches(r"Frozen job → ram \(\d+ ms\)", out(daemon, "freeze", "job"))
    matches(r"Frozen job → ram \(0 ms\)", out(daemon, "freeze", "job"))
    matches(r"Thawed job ← ram \(\d+ ms\)", out(daemon, "thaw", "job"))
    matches(r"Thawed job ← gpu \(0 ms\)", out(daemon, "thaw", "job"))
    matches(r"Migrated job: GPU 0 → GPU 1", out(daemon, "migrate", "job", "--to", "1"))
    wait_until(lambda: digests(daemon, "job"), within_s=20, what="it is ready")
    prove_contents(daemon, "job")
    cwd = Path(f"/proc/{process(daemon, 'job')['pid']}/cwd").readlink()
    assert str(cwd) == str(tmp_path.resolve())
    assert out(daemon, "kill", "job") == "Killed job\n"
    assert find(daemon, "job") is None


def test_the_same_as_json(daemon: PrivateDaemon) -> None:
    done = call(daemon, "run", "--json", "-n", "job", "-g", "0,1", "--", *SLEEP)
    assert json.loads(done.stdout) == {"name": "job", "pid": process(daemon, "job")["pid"]}
    assert process(daemon, "job")["gpus"] == [0, 1]
    frozen = out_json(daemon, "freeze", "job")
    assert (frozen["name"], frozen["tier"], frozen["mem_mb"]) == ("job", "ram", 0)
    assert out_json(daemon, "thaw", "job")["from_tier"] == "ram"
    assert out_json(daemon, "migrate", "job", "--to", "1,0")["to_gpu"] == 1
    assert out_json(daemon, "acquire", "job", "--for", "10m")["expires_s"] == 600
    assert out_json(daemon, "release", "job") == {"name": "job", "released": 1}
    status = out_json(daemon, "status")
    assert set(status) >= set(ask(daemon, "status"))
    assert [p["name"] for p in status["processes"]] == ["job"]
    assert out_json(daemon, "kill", "job") == {"name": "job"}


def test_the_name_defaults_to_the_command(daemon: PrivateDaemon) -> None:
    matches(r"Started sleep \(pid=\d+\)", out(daemon, "run", "sleep", "1000"))
    call(daemon, "run", "sleep", "1000", code=3)
    call(daemon, "run", "-n", "../up", "sleep", "1000", code=3)


def test_run_sends_the_callers_directory_and_environment(
    daemon: PrivateDaemon, tmp_path: Path
) -> None:
    script = 'echo "$PWD $GPUSCHED_SOCKET $GPUSCHED_MANAGED"'
    call(daemon, "run", "-n", "job", "--", "sh", "-c", script, cwd=tmp_path)
    wait_state(daemon, "job", "dead")
    assert log_lines(daemon, "job") == [f"{tmp_path.resolve()} {daemon.socket} 1"]


def test_swap(daemon: PrivateDaemon) -> None:
    start(daemon, "off", "16M")
    ask(daemon, "freeze", name="off")
    start(daemon, "on", "16M")
    done = call(daemon, "thaw", "off", code=4)
    assert "error: off needs 16 MiB on GPU 0" in done.stderr
    assert "gpusched thaw --evict off" in done.stderr
    first, second = out(daemon, "swap", "on", "off").splitlines()
    matches(r"Frozen on → ram \(\d+ ms\)", f"{first}\n")
    matches(r"Thawed off ← ram \(\d+ ms\)", f"{second}\n")
    swapped = out_json(daemon, "swap", "off", "on")
    assert [r["name"] for r in (*swapped["off"], *swapped["on"])] == ["off", "on"]
    first, second = out(daemon, "thaw", "off", "--evict").splitlines()
    matches(r"Evicted on", f"{second}\n")
    prove_contents(daemon, "off")


def test_status_in_a_pipe(daemon: PrivateDaemon) -> None:
    start(daemon, "job")
    text = out(daemon, "status")
    assert re.search(r"^0 +24 +8 +16 +Simulated GPU \[simulated\]$", text, re.M), text
    pid = process(daemon, "job")["pid"]
    assert re.search(rf"^job +active +gpu +0 +8 +\d+s +{pid} +root +-$", text, re.M), text
    assert "\x1b" not in text


def test_adopt_and_exit_code_of_wait(daemon: PrivateDaemon) -> None:
    program = subprocess.Popen(SLEEP)
    matches(
        rf"Adopted mine \(pid={program.pid}\)",
        out(daemon, "adopt", "--pid", str(program.pid), "--name", "mine"),
    )
    assert "adopted" in out(daemon, "status")
    program.kill()
    program.wait()
    wait_state(daemon, "mine", "dead")
    call(daemon, "wait", "--exit", "mine", code=6)  # nobody saw how it ended
    for script, code in (("exit 7", 7), ("kill -TERM $$", 128 + 15), ("exit 0", 0)):
        ask(daemon, "run", name="job", cmd=["sh", "-c", f"sleep 0.2; {script}"])
        call(daemon, "wait", "--exit", "job", code=code)
    call(daemon, "wait", "job", code=6)
    call(daemon, "wait", "--timeout", "200ms", "nobody", code=6)
    call(daemon, "wait", "--exit", "nobody", code=3)


# -- looking on -----------------------------------------------------------------------------------


def test_logs(daemon: PrivateDaemon) -> None:
    run_job(daemon, cmd=["sh", "-c", "seq 60; exec sleep 1000"])
    wait_until(lambda: "60" in log_lines(daemon, "job"), within_s=10, what="60 lines")
    assert out(daemon, "logs", "job").split() == [str(n) for n in range(11, 61)]
    assert out(daemon, "logs", "job", "-n", "2") == "59\n60\n"
    assert len(out(daemon, "logs", "job", "--lines", "-1").split()) == 60
    assert out_json(daemon, "logs", "job", "-n", "1")["lines"] == ["60"]


def test_logs_are_followed_to_the_end(daemon: PrivateDaemon) -> None:
    run_job(daemon, cmd=["sh", "-c", "echo one; sleep 0.4; echo two"])
    assert out(daemon, "logs", "-f", "job") == "one\ntwo\n"
    followed = out(daemon, "logs", "-f", "job", "--json").splitlines()
    assert [json.loads(line)["line"] for line in followed] == ["one", "two"]


def test_events(daemon: PrivateDaemon) -> None:
    run_job(daemon, "seen")
    follower = spawn(daemon, "events", "-f", "--json")
    assert follower.stdout is not None
    past = [json.loads(follower.stdout.readline())]
    while (past[-1]["type"], past[-1].get("process")) != ("run", "seen"):
        past.append(json.loads(follower.stdout.readline()))
    ask(daemon, "freeze", name="seen")
    event = json.loads(follower.stdout.readline())
    assert (event["type"], event["process"]) == ("freeze", "seen")
    follower.send_signal(signal.SIGINT)
    follower.communicate(timeout=10)
    assert follower.returncode == 130
    last = out(daemon, "events").splitlines()[-1]
    assert re.search(r"Z +freeze +seen +\d+ ms", last), last


# -- leases ---------------------------------------------------------------------------------------


def test_acquire_for_the_time_of_a_command(daemon: PrivateDaemon) -> None:
    run_job(daemon)
    ask(daemon, "freeze", name="job")
    probe = f"{sys.executable} -m gpusched status; exit 5"
    done = call(daemon, "acquire", "job", "--", "sh", "-c", probe, code=5)
    assert re.search(r"^job +active .* leased$", done.stdout, re.M), done.stdout
    wait_until(lambda: process(daemon, "job")["leases"] == 0, within_s=5, what="it is released")
    call(daemon, "acquire", "job", "--", "no-such-program", code=127)


def test_acquire_until_interrupted(daemon: PrivateDaemon) -> None:
    run_job(daemon)
    holder = spawn(daemon, "acquire", "job")
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("Acquired job ← gpu (0 ms), until interrupted")
    done = call(daemon, "freeze", "job", code=3)
    assert "is leased" in done.stderr and "--force" in done.stderr
    refused = json.loads(call(daemon, "kill", "job", "--json", code=3).stderr)
    assert (refused["code"], refused["retryable"]) == ("lease_held", True)
    holder.send_signal(signal.SIGINT)
    holder.communicate(timeout=10)
    assert holder.returncode == 130
    wait_until(lambda: process(daemon, "job")["leases"] == 0, within_s=5, what="it is released")
    matches(r"Frozen job → ram \(\d+ ms\)", out(daemon, "freeze", "job"))


def test_acquire_for_a_time_and_release(daemon: PrivateDaemon) -> None:
    run_job(daemon)
    matches(
        r"Acquired job ← gpu \(0 ms\), for 10m00s", out(daemon, "acquire", "job", "--for", "10m")
    )
    call(daemon, "kill", "job", code=3)
    matches(r"Released job \(1 lease\)", out(daemon, "release", "job"))
    matches(r"Released job \(0 leases\)", out(daemon, "release", "job"))
    call(daemon, "acquire", "job", "--for", "10m")
    assert out(daemon, "kill", "job", "--force") == "Killed job\n"


def test_an_acquire_ends_with_its_process(daemon: PrivateDaemon) -> None:
    run_job(daemon)
    holder = spawn(daemon, "acquire", "job")
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("Acquired")
    ask(daemon, "kill", name="job", force=True)
    _, text = holder.communicate(timeout=10)
    assert holder.returncode == 6 and "job has ended" in text


# -- errors ---------------------------------------------------------------------------------------


def test_exit_codes_and_texts(daemon: PrivateDaemon) -> None:
    done = call(daemon, "freeze", "nobody", code=3)
    assert done.stderr.startswith("error: no process named 'nobody'") and done.stdout == ""
    call(daemon, "nonsense", code=2)
    call(daemon, "freeze", code=2)
    call(daemon, "run", "-g", "x", "--", "true", code=2)
    assert "GPUs 0, 1" in call(daemon, "run", "-g", "7", "--", "true", code=3).stderr
    assert "cannot execute" in call(daemon, "run", "--", "/no/such", code=3).stderr
    done = call(daemon, "-s", "/no/such/socket", "status", code=6)
    assert "daemon is not running" in done.stderr and "gpusched daemon" in done.stderr
    assert out(daemon, "--version").startswith("gpusched ")
    assert find(daemon, "nobody") is None


def test_the_socket_may_be_named_before_and_after_the_command(daemon: PrivateDaemon) -> None:
    for arguments in (["-s", daemon.socket, "status"], ["status", "--socket", daemon.socket]):
        env = {k: v for k, v in os.environ.items() if k != "GPUSCHED_SOCKET"}
        done = subprocess.run(
            [*PROGRAM, *arguments], capture_output=True, text=True, env=env, timeout=60, check=True
        )
        assert "Simulated GPU" in done.stdout


def test_a_second_daemon_is_refused(daemon: PrivateDaemon) -> None:
    same_state = ["--state-dir", str(daemon.state_dir), "--backend", "sim"]
    done = call(daemon, "-s", f"{daemon.socket}2", "daemon", *same_state, code=6)
    assert "another daemon uses" in done.stderr
    other_state = ["--state-dir", f"{daemon.state_dir}2", "--log-dir", str(daemon.log_dir)]
    other_state += ["--backend", "sim", "--sim-vram", "8M"]
    done = call(daemon, "daemon", *other_state, code=6)
    assert "a daemon serves" in done.stderr
    shutil.rmtree(sim_directory(Path(f"{daemon.state_dir}2")))  # it had come as far as that
    assert ask(daemon, "status")["pid"] == daemon.pid


def test_names_are_completed_from_the_daemon(daemon: PrivateDaemon) -> None:
    run_job(daemon, "policy")
    run_job(daemon, "reward")

    def complete(words: str) -> list[str]:
        done = subprocess.run(
            PROGRAM,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={
                **environment(daemon),
                "_GPUSCHED_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split(" ")) - 1),
            },
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("gpusched freeze ") == ["policy", "reward"]
    assert complete("gpusched swap policy re") == ["reward"]
    assert "freeze" in complete("gpusched fr")
    assert "_GPUSCHED_COMPLETE" in out(daemon, "completion", "bash")


# -- without a daemon -----------------------------------------------------------------------------


def test_rescue_thaws_without_a_daemon(daemon: PrivateDaemon) -> None:
    pid = start(daemon, "job")
    ask(daemon, "freeze", name="job")
    daemon.kill9()
    report = out_json(daemon, "rescue", str(pid))
    assert report["processes"] == [{"pid": pid, "before": "checkpointed", "after": "running"}]
    assert driver_state(daemon, pid) == "running"
    daemon.start()
    assert state(daemon, "job") == "active"
    prove_contents(daemon, "job")
    assert SimDriver(daemon.sim_dir).states([pid])[pid] == "running"
    call(daemon, "rescue", "4194304", code=3)


def test_the_daemon_ends_on_sigterm_and_its_processes_live_on(daemon: PrivateDaemon) -> None:
    pid = run_job(daemon)
    assert daemon.stop() == 0
    call(daemon, "status", code=6)
    daemon.start()
    assert (process(daemon, "job")["pid"], state(daemon, "job")) == (pid, "active")
