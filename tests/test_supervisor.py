"""The supervisor of a tree: how a command starts, whom it runs as, what outlives what, how its end is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from daemons import ROOT, wait_until
from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.ports import ExitStatus, Identity, Launch
from launched_trees import GID, PATH, UID, LiveTrees, interpreter_for_others, state_of

WITHIN_S = 5.0


@pytest.fixture(params=["host", pytest.param("isolated", marks=pytest.mark.root)])
def trees(request: pytest.FixtureRequest) -> Iterator[LiveTrees]:
    """In the host's namespaces and in their own: no difference for the command, nor for the daemon."""
    with LiveTrees(isolated=request.param == "isolated") as live:
        yield live


def status_lines(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def supervisor_of(trees: LiveTrees, tree_id: str) -> int:
    pid = json.loads((trees.tree(tree_id) / "alive.lock").read_text())["pid"]
    assert isinstance(pid, int)
    return pid


def descriptors(pid: int) -> dict[str, str]:
    """What each is open on."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[link.name] = str(link.readlink())
    return found


def until(condition: object, what: str) -> None:
    assert callable(condition)
    wait_until(condition, within_s=WITHIN_S, what=what)


# -- the end of a command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", ExitStatus(code=0)),
        ("exit 7", ExitStatus(code=7)),
        ("kill -KILL $$", ExitStatus(signal=signal.SIGKILL)),
        ("kill -TERM $$", ExitStatus(signal=signal.SIGTERM)),
    ],
)
async def test_the_exit_status_is_recorded(
    trees: LiveTrees, script: str, expected: ExitStatus
) -> None:
    before = time.time()
    tree_id, main = await trees.shell(script)
    assert await trees.keeper.wait_exit(tree_id, main) == expected
    assert await trees.keeper.exit_status(tree_id) == expected
    ended = json.loads((trees.tree(tree_id) / "exit.json").read_text())["ended_unix_s"]
    assert before - 1 <= ended <= time.time() + 1


async def test_a_restarted_daemon_learns_how_a_command_ended(trees: LiveTrees) -> None:
    tree_id, main = await trees.shell(
        f"while [ ! -e {trees.directory}/go ]; do sleep 0.01; done; exit 7"
    )
    keeper = trees.new_keeper()
    assert await keeper.exit_status(tree_id) is None
    (trees.directory / "go").touch()
    assert await keeper.wait_exit(tree_id, main) == ExitStatus(code=7)


async def test_the_log_holds_all_that_was_written(trees: LiveTrees) -> None:
    tree_id, main = await trees.shell("seq 1 20000; echo complaint >&2; seq 20001 30000")
    await trees.keeper.wait_exit(tree_id, main)
    lines = [*map(str, range(1, 20001)), "complaint", *map(str, range(20001, 30001))]
    assert trees.log().splitlines() == lines
    found = (trees.logs / "job.log").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, UID, GID)


async def test_one_previous_log_is_kept(trees: LiveTrees) -> None:
    for word in ("first", "second", "third"):
        tree_id, main = await trees.shell(f"echo {word}")
        await trees.keeper.wait_exit(tree_id, main)
    assert trees.log() == "third\n"
    assert (trees.logs / "job.log.1").read_text() == "second\n"
    assert sorted(p.name for p in trees.logs.iterdir()) == ["job.log", "job.log.1"]


async def test_what_is_left_of_a_tree_gets_a_sigterm(trees: LiveTrees) -> None:
    orphan = 'trap "echo told; exit" TERM; echo ready; while :; do sleep 0.01; done'
    tree_id, main = await trees.shell(
        f"setsid sh -c '{orphan}' & while ! grep -q ready /proc/$$/fd/1; do sleep 0.01; done; exit 3"
    )
    group = trees.keeper._tie(tree_id)[1]
    assert await trees.keeper.wait_exit(tree_id, main) == ExitStatus(code=3)
    until(
        lambda: not trees.marked() and not trees.supervisors(),
        "the rest and the supervisor are gone",
    )
    assert trees.log().splitlines()[-1] == "told"
    assert group is None or not group.exists()


async def test_what_is_left_and_stopped_gets_a_sigkill_at_once(trees: LiveTrees) -> None:
    tree_id, main = await trees.shell("sh -c 'kill -STOP $$' & sleep 60")
    until(lambda: any(state_of(pid) == "T" for pid in trees.marked()), "one has stopped")
    os.kill(main.pid, signal.SIGKILL)
    await trees.keeper.wait_exit(tree_id, main)
    wait_until(lambda: not trees.supervisors(), within_s=2.0, what="the supervisor has ended")
    assert not trees.marked()


@pytest.mark.slow  # the grace period is five seconds
async def test_what_ignores_the_sigterm_gets_a_sigkill(trees: LiveTrees) -> None:
    deaf = 'trap "" TERM; echo deaf; while :; do sleep 0.1; done'
    tree_id, main = await trees.shell(f"setsid sh -c '{deaf}' & sleep 60")
    until(lambda: trees.log() == "deaf\n", "it is deaf")
    os.kill(main.pid, signal.SIGKILL)
    await trees.keeper.wait_exit(tree_id, main)
    await asyncio.sleep(2.0)
    assert trees.marked(), "it has its five seconds"
    wait_until(lambda: not trees.supervisors(), within_s=10, what="the supervisor has ended")
    assert not trees.marked()


@pytest.mark.root
async def test_a_full_disk_does_not_cost_the_exit_status(trees: LiveTrees) -> None:
    state = trees.directory / "state"
    with small_disk(state):
        keeper = trees.new_keeper()
        tree_id, main = await trees.shell("kill -STOP $$; exit 7")
        until(lambda: state_of(main.pid) == "T", "the command has stopped itself")
        with pytest.raises(OSError, match="No space"), (state / "ballast").open("wb", 0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(errors.InsufficientDisk):
            await trees.shell("true", name="other")
        assert [p.name for p in (state / "trees").iterdir()] == [tree_id]
        os.kill(main.pid, signal.SIGCONT)
        assert await keeper.wait_exit(tree_id, main) == ExitStatus(code=7)
        until(lambda: not trees.supervisors(), "the supervisor has ended")


@contextlib.contextmanager
def small_disk(point: Path) -> Iterator[None]:
    options = "size=256k,mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", point], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)


# -- starts that fail -----------------------------------------------------------------------------


async def failing(trees: LiveTrees, order: Launch) -> errors.GpuschedError:
    """The error of a start; proves that it left nothing, and the log of the run before in its place."""
    (trees.logs / "job.log").write_text("of the run before")
    with pytest.raises(errors.GpuschedError) as raised:
        await trees.keeper.launch(order)
    assert list(trees.tree(order.tree_id).parent.iterdir()) == []
    assert [p.name for p in trees.logs.iterdir()] == ["job.log"]
    assert trees.log() == "of the run before"
    until(lambda: not trees.marked() and not trees.supervisors(), "no process is left")
    assert not list(Path("/sys/fs/cgroup").glob(f"**/gpusched-{order.tree_id}"))
    return raised.value


async def test_a_command_that_cannot_be_executed_is_refused(trees: LiveTrees) -> None:
    script = trees.directory / "script"
    script.write_text("echo no interpreter\n")
    script.chmod(0o755)
    plain = trees.directory / "plain"
    plain.touch(0o644)
    for argv, text in (
        (
            ["gpusched-no-such"],
            f"cannot execute 'gpusched-no-such': no such file or directory; looked in PATH={PATH}",
        ),
        (["./no-such"], "cannot execute './no-such': no such file or directory; looked in /"),
        (["/no/such"], "cannot execute '/no/such': no such file or directory"),
        ([str(plain)], f"cannot execute '{plain}': permission denied"),
        (
            [str(script)],
            f"cannot execute '{script}': exec format error; a script must begin with #! and its interpreter",
        ),
        (["a\0b"], "cannot execute 'a\\x00b': embedded null byte"),
        (["sh", "x" * (1 << 18)], "cannot execute 'sh': argument list too long"),
    ):
        error = await failing(trees, trees.order(*argv))
        assert isinstance(error, errors.InvalidRequest)
        assert str(error).startswith(text), error


async def test_a_working_directory_that_cannot_be_entered_is_refused(trees: LiveTrees) -> None:
    error = await failing(trees, trees.order("true", cwd="/no/such"))
    assert isinstance(error, errors.InvalidRequest)
    assert str(error) == "cannot work in directory '/no/such': no such file or directory"


@pytest.mark.root
async def test_the_directory_is_entered_as_the_user(trees: LiveTrees) -> None:
    closed = trees.directory / "closed"
    closed.mkdir(0o700)
    error = await failing(trees, trees.order("true", cwd=str(closed)))
    assert isinstance(error, errors.InvalidRequest)
    assert str(error) == f"cannot work in directory '{closed}': permission denied"


async def test_only_a_regular_file_is_replaced_by_a_log(trees: LiveTrees) -> None:
    order = trees.order("true", log_path=str(trees.directory))
    with pytest.raises(errors.InternalError, match="file exists"):
        await trees.keeper.launch(order)
    order = trees.order("sh", "-c", "echo lost; exit 4", log_path=os.devnull)
    main = await trees.keeper.launch(order)
    assert await trees.keeper.wait_exit(order.tree_id, main) == ExitStatus(code=4)
    assert Path(os.devnull).is_char_device()


async def test_a_tree_id_is_used_once_and_leads_nowhere_else(trees: LiveTrees) -> None:
    order = trees.order("sleep", "60")
    main = await trees.keeper.launch(order)
    with pytest.raises(errors.AlreadyExists):
        await trees.keeper.launch(order)
    assert await trees.keeper.is_alive(main)
    with pytest.raises(errors.InvalidRequest):
        await trees.keeper.forget("../trees")
    assert trees.tree(order.tree_id).is_dir()


# -- what a command gets, and what it does not ----------------------------------------------------


async def test_a_command_has_its_three_descriptors_and_the_supervisor_nothing_of_the_daemons(
    trees: LiveTrees,
) -> None:
    held_by_daemon = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(held_by_daemon, True)
    try:
        tree_id, main = await trees.shell("sleep 60")
    finally:
        os.close(held_by_daemon)
    log = str(trees.logs / "job.log")
    # Each may be beginning still, with a library open that it reads.
    until(
        lambda: descriptors(main.pid) == {"0": "/dev/null", "1": log, "2": log},
        "the command has its three and no other",
    )
    pid = supervisor_of(trees, tree_id)
    tree = trees.tree(tree_id)
    own = {"anon_inode:[pidfd]"} if trees.isolated else set()
    names = ("supervisor.log", "exit.json.part", "alive.lock")
    expected = own | {"/dev/null", *(str(tree / name) for name in names)}
    until(lambda: set(descriptors(pid).values()) == expected, "the supervisor has its own")
    supervisor = Path(f"/proc/{pid}")
    assert (supervisor / "environ").read_bytes() == b""
    command = (supervisor / "cmdline").read_bytes().split(b"\0")
    assert b"job" in command, "a person can tell whose supervisor it is"
    assert (supervisor / "comm").read_text() == "gpusched-tree\n"


async def test_the_environment_is_exactly_what_was_sent(trees: LiveTrees) -> None:
    key, _, value = trees.mark.partition("=")
    env = {"PATH": PATH, key: value, "LINES": "a\nb", "ODD": "\udcff\udc80", "EMPTY": "", "Ü": "ß"}
    order = trees.order("env", "-0", env=env)
    main = await trees.keeper.launch(order)
    await trees.keeper.wait_exit(order.tree_id, main)
    entries = (trees.logs / "job.log").read_bytes().rstrip(b"\0").split(b"\0")
    assert dict(os.fsdecode(e).split("=", 1) for e in entries) == env


async def test_the_command_is_looked_up_in_its_own_path(trees: LiveTrees) -> None:
    directory = trees.directory / "bin"
    directory.mkdir()
    (directory / "gpusched-test-command").write_text("#!/bin/sh\necho found $1\n")
    (directory / "gpusched-test-command").chmod(0o755)
    env = {"PATH": f"/etc/passwd:/no/such:{directory}"}
    order = trees.order("gpusched-test-command", "it", env=env)
    main = await trees.keeper.launch(order)
    assert await trees.keeper.wait_exit(order.tree_id, main) == ExitStatus(code=0)
    assert trees.log() == "found it\n"


@pytest.mark.root
async def test_a_command_is_its_user_and_nobody_else(trees: LiveTrees) -> None:
    order = trees.order("sleep", "60", groups=(UID, 12345))
    main = await trees.keeper.launch(order)
    found = status_lines(main.pid)
    assert found["Uid"].split() == [str(UID)] * 4
    assert found["Gid"].split() == [str(GID)] * 4
    assert {int(g) for g in found["Groups"].split()} == {UID, 12345}
    assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == int(found["CapInh"], 16) == 0
    tree = trees.tree(order.tree_id)
    for path in (tree.parent, tree, *tree.iterdir()):
        mode = path.lstat()
        assert (mode.st_uid, stat.S_IMODE(mode.st_mode) & 0o077) == (0, 0), path


@pytest.mark.root
async def test_the_supervisor_survives_the_oom_killer_and_the_command_is_a_usual_victim(
    trees: LiveTrees,
) -> None:
    tree_id, main = await trees.shell("sleep 60")
    assert Path(f"/proc/{main.pid}/oom_score_adj").read_text() == "0\n"
    supervisor = supervisor_of(trees, tree_id)
    capabilities = int(status_lines(os.getpid())["CapEff"], 16)
    may_lower = bool(capabilities >> 24 & 1)  # CAP_SYS_RESOURCE; containers often go without
    expected = "-900\n" if may_lower else Path("/proc/self/oom_score_adj").read_text()
    assert Path(f"/proc/{supervisor}/oom_score_adj").read_text() == expected


async def test_signals_session_and_umask_are_as_for_a_login(trees: LiveTrees) -> None:
    old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        order = trees.order("sleep", "60", cwd="/usr")
        main = await trees.keeper.launch(order)
    finally:
        signal.signal(signal.SIGUSR1, old)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    found = status_lines(main.pid)
    own = 0b11 << 31  # signals 32 and 33 are the C library's: nobody else can set them
    assert int(found["SigIgn"], 16) & ~own == int(found["SigBlk"], 16) & ~own == 0
    assert found["Umask"] == "0022"
    assert os.getsid(main.pid) == os.getpgid(main.pid) == main.pid
    assert str(Path(f"/proc/{main.pid}/cwd").readlink()) == "/usr"


@pytest.mark.root
def test_an_ordinary_user_starts_their_own_commands_and_nobody_elses() -> None:
    program = """
import asyncio, os, sys, pathlib
from gpusched import errors
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.ports import Launch
async def main(directory):
    keeper = TreeKeeper(directory / "state")
    def order(tree_id, uid):
        return Launch(tree_id=tree_id, name=tree_id, argv=("sh", "-c", "id -u; exit 5"), env={"PATH": os.defpath},
                      cwd="/", uid=uid, gid=os.getgid(), groups=(), log_path=str(directory / f"{tree_id}.log"))
    print(await keeper.wait_exit("own", await keeper.launch(order("own", os.getuid()))))
    try:
        await keeper.launch(order("other", 0))
    except errors.PermissionDenied as error:
        print(error)
    print(sorted(p.name for p in (directory / "state/trees").iterdir()), (directory / "own.log").read_text())
asyncio.run(main(pathlib.Path(sys.argv[1])))
"""
    with LiveTrees() as trees:  # a directory that another user may enter
        theirs = trees.directory / "theirs"
        theirs.mkdir()
        os.chown(theirs, UID, GID)
        ended = subprocess.run(
            [interpreter_for_others(), "-c", program, str(theirs)],
            user=UID,
            group=GID,
            extra_groups=[],
            env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [
        "ExitStatus(code=5, signal=None)",
        f"the daemon runs as uid {UID} and cannot start processes of uid 0",
        f"['own'] {UID}",
        "",
    ]


# -- outliving the daemon -------------------------------------------------------------------------

LAUNCHER = """
import asyncio, dataclasses, json, sys, pathlib
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.ports import Launch
order = json.load(sys.stdin)
async def main():
    keeper = TreeKeeper(pathlib.Path(sys.argv[1]))
    print("launching", flush=True)
    main = await keeper.launch(Launch(**{**order, "argv": tuple(order["argv"]), "groups": tuple(order["groups"])}))
    print(json.dumps(dataclasses.asdict(main)), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def launcher(trees: LiveTrees, order: Launch) -> subprocess.Popen[str]:
    """A process that starts a tree as a daemon would; it has written "launching" and is about to."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(trees.directory / "state")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asdict(order)))
    process.stdin.close()
    assert process.stdout.readline() == "launching\n"
    return process


def kill(process: subprocess.Popen[str]) -> str:
    """SIGKILL; what it still had to say."""
    assert process.stdout is not None
    process.kill()
    rest = process.stdout.read()
    process.stdout.close()
    process.wait(WITHIN_S)
    return rest


async def test_a_command_outlives_the_daemon_and_its_end_is_recorded(trees: LiveTrees) -> None:
    go = trees.directory / "go"
    order = trees.order("sh", "-c", f"while [ ! -e {go} ]; do sleep 0.01; done; echo done; exit 7")
    process = launcher(trees, order)
    assert process.stdout is not None
    main = Identity(**json.loads(process.stdout.readline()))
    kill(process)
    keeper = trees.new_keeper()
    assert await keeper.leftovers() == [(order.tree_id, order, main)]
    deaf = [signal.SIGQUIT, signal.SIGUSR1, signal.SIGPIPE]
    if not trees.isolated:  # an init hands them on
        deaf += [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    for number in deaf:
        os.kill(supervisor_of(trees, order.tree_id), number)
    go.touch()
    assert await keeper.wait_exit(order.tree_id, main) == ExitStatus(code=7)
    assert trees.log() == "done\n"
    assert await keeper.leftovers() == []


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 15, 20, 25, 30, 40])
async def test_a_daemon_killed_while_it_starts_a_command(trees: LiveTrees, delay_ms: int) -> None:
    """Whenever it dies: either the command runs and is found, or it never ran a single instruction."""
    order = trees.order("sh", "-c", "echo ran; sleep 60")
    process = launcher(trees, order)
    await asyncio.sleep(delay_ms / 1000)
    kill(process)
    found = await trees.new_keeper().leftovers()
    if found:
        ((tree_id, launch, main),) = found
        assert (tree_id, launch) == (order.tree_id, order)
        until((trees.logs / "job.log").exists, "the log has its name")
        until(lambda: trees.log() == "ran\n", "the command runs")
        assert main.pid in trees.marked()
    else:
        until(lambda: not trees.supervisors(), "no supervisor is left")
        assert not trees.marked()
        logs = [p.read_text() for p in trees.logs.iterdir()]
        assert "ran\n" not in logs
        assert not trees.tree(order.tree_id).exists()


async def test_a_command_outlives_its_supervisor_and_its_end_is_noticed(trees: LiveTrees) -> None:
    tree_id, main = await trees.shell("sleep 60 & wait")
    until(lambda: len(trees.sleepers()) == 1, "both run")
    supervisor = supervisor_of(trees, tree_id)
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: state_of(supervisor) in {"", "Z"}, "the supervisor is gone")
    if trees.isolated:  # the kernel ends a PID namespace with its init
        assert await trees.keeper.wait_exit(tree_id, main) == ExitStatus()
        assert not trees.marked()
        return
    assert {m.pid for m in await trees.keeper.members(tree_id, main)} == trees.marked()
    os.kill(main.pid, signal.SIGKILL)
    began = time.monotonic()
    assert await trees.keeper.wait_exit(tree_id, main) == ExitStatus()
    assert time.monotonic() - began < 1.5, "nobody is left to wait for"


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_an_init_hands_on_what_ends_a_program(number: signal.Signals) -> None:
    with LiveTrees(isolated=True) as trees:
        script = (
            f"trap 'echo told; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.01; done"
        )
        tree_id, main = await trees.shell(script)
        until(lambda: trees.log() == "ready\n", "it listens")
        os.kill(supervisor_of(trees, tree_id), number)
        assert await trees.keeper.wait_exit(tree_id, main) == ExitStatus(code=9)


@pytest.mark.root
async def test_an_isolated_tree_sees_itself_alone(trees: LiveTrees) -> None:
    """Its own pids, from 1000 on; nobody else's /proc, and a /dev/shm of its own. The host sees it all."""
    if not trees.isolated:
        return
    marker = Path(f"/dev/shm/{trees.directory.name}")
    marker.touch()
    try:
        show = "echo $$ $PPID; ls /proc | grep -c '^[0-9]'; ls /dev/shm | wc -l; cat /proc/1/environ /proc/1/fd/0"
        tree_id, main = await trees.shell(
            f"{show}; touch /dev/shm/mine; ls -l /dev/shm | wc -l; sleep 60"
        )
        until(lambda: len(trees.log().splitlines()) >= 6, "it has looked")
        lines = trees.log().splitlines()
        assert lines[0] == "1000 1"
        assert int(lines[1]) <= 5
        assert lines[2] == "0"
        assert all("Permission denied" in line for line in lines[3:5]), lines
        assert not Path("/dev/shm/mine").exists()
        (found,) = [m for m in await trees.keeper.members(tree_id, main) if m.pid == main.pid]
        assert status_lines(found.pid)["NSpid"].split() == [str(main.pid), "1000"]
    finally:
        marker.unlink()


async def test_fifty_starts_in_sequence(trees: LiveTrees) -> None:
    took, mains = [], []
    for number in range(50):
        began = time.perf_counter()
        mains.append((await trees.shell("exec sleep 60", name=f"job{number}"))[1])
        took.append((time.perf_counter() - began) * 1000)
    assert trees.marked() == {main.pid for main in mains}
    assert len(trees.supervisors()) == 50
    resident = [int(status_lines(pid)["VmRSS"].split()[0]) for pid in trees.supervisors()]
    print(
        f"start: median {statistics.median(took):.0f} ms, {min(took):.0f} to {max(took):.0f} ms;"
        f" supervisor: {statistics.median(resident) / 1024:.1f} MiB resident;"
        f" one look at {len(proc.scan())} processes"
    )
    assert statistics.median(took) < 500
