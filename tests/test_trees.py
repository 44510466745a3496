"""Trees: who belongs to one, signals that reach nobody else, waiting for the end, finding them again."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import wait_until
from gpusched import errors
from gpusched.mechanisms import cgroups, proc
from gpusched.mechanisms import trees as trees_module
from gpusched.ports import ExitStatus, Identity, Member
from launched_trees import UID, LiveTrees, environment_of, interpreter_for_others, state_of

WITHIN_S = 5.0


@pytest.fixture
def trees() -> Iterator[LiveTrees]:
    with LiveTrees() as live:
        yield live


@pytest.fixture(
    params=["group", "no group", pytest.param("isolated", marks=pytest.mark.root)],
)
def both(request: pytest.FixtureRequest) -> Iterator[LiveTrees]:
    """Once with control groups, where the host has them, once without, and once in namespaces of their own."""
    with LiveTrees(
        with_groups=request.param != "no group", isolated=request.param == "isolated"
    ) as live:
        yield live


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that nobody here launched; a child of the test."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def until(condition: object, what: str) -> None:
    assert callable(condition)
    wait_until(condition, within_s=WITHIN_S, what=what)


def pids(members: list[Member]) -> set[int]:
    return {member.pid for member in members}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def spawn(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv)


#: Main, a child, and a grandchild that left its session and its parents.
FAMILY = "sleep 60 & (setsid sh -c 'sleep 60 & exec sleep 60' &) ; exec sleep 60"


# -- members --------------------------------------------------------------------------------------


async def test_every_descendant_is_a_member_also_those_that_left(both: LiveTrees) -> None:
    tree_id, main = await both.shell(FAMILY)
    until(lambda: len(both.sleepers()) == 4, "the family is complete")
    members = await both.keeper.members(tree_id, main)
    assert pids(members) == both.marked()
    assert members[0].pid == main.pid
    assert members[0].start_ticks == main.start_ticks
    assert {m.ruid for m in members} == {UID}
    assert not any(m.stopped for m in members)


async def test_orphans_are_members_until_they_end(both: LiveTrees) -> None:
    tree_id, main = await both.shell("trap '' TERM; (setsid sleep 61 &); exec sleep 60")
    until(lambda: len(both.sleepers()) == 2, "both run")
    (orphan,) = both.marked() - {main.pid}
    os.kill(orphan, signal.SIGKILL)
    until(lambda: both.marked() == {main.pid}, "the orphan has ended")
    assert pids(await both.keeper.members(tree_id, main)) == {main.pid}
    os.kill(main.pid, signal.SIGKILL)
    await both.keeper.wait_exit(tree_id, main)
    assert await both.keeper.members(tree_id, main) == []


async def test_a_restarted_daemon_finds_the_same_members(both: LiveTrees) -> None:
    tree_id, main = await both.shell(FAMILY)
    until(lambda: len(both.sleepers()) == 4, "the family is complete")
    assert pids(await both.new_keeper().members(tree_id, main)) == both.marked()


async def test_a_fork_storm_is_seen_consistently_and_can_be_stopped(both: LiveTrees) -> None:
    """Stopping all that runs until nothing runs leaves nobody running: what a freeze relies on."""
    tree_id, main = await both.shell("while :; do (sleep 0.02; :) & sleep 0.002; done")
    for _ in range(30):
        members = await both.keeper.members(tree_id, main)
        assert members[0].pid == main.pid
        assert len(pids(members)) == len(members)
        for member in members:
            found = environment_of(member.pid)
            assert not found or both.mark in found, "no member of another tree, no supervisor"
    deadline = time.monotonic() + WITHIN_S
    while running := [m for m in await both.keeper.members(tree_id, main) if not m.stopped]:
        assert time.monotonic() < deadline
        await both.keeper.signal(running, signal.SIGSTOP)
    assert {state_of(pid) for pid in both.marked()} <= {"T", "D"}  # D: see the test of vfork
    assert pids(await both.keeper.members(tree_id, main)) == both.marked()


async def test_a_parent_that_waits_for_a_stopped_vfork_child_counts_as_stopped(
    both: LiveTrees,
) -> None:
    """It is deaf to SIGSTOP, so waiting for it to stop would never end; it does nothing either."""
    fifo = both.directory / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o644)
    program = (  # the child waits for a writer before its exec, and so does the parent
        f"import os, signal; os.posix_spawn('/bin/true', ['true'], os.environ, file_actions="
        f"[(os.POSIX_SPAWN_OPEN, 0, {str(fifo)!r}, os.O_RDONLY, 0)]); signal.pause()"
    )
    order = both.order(interpreter_for_others(), "-I", "-S", "-c", program)
    main = await both.keeper.launch(order)
    until(lambda: sorted(map(state_of, both.marked())) == ["D", "S"], "the parent waits")
    members = await both.keeper.members(order.tree_id, main)
    assert [m.stopped for m in members] == [False, False]
    await both.keeper.signal(members, signal.SIGSTOP)
    until(lambda: sorted(map(state_of, both.marked())) == ["D", "T"], "the child has stopped")
    members = await both.keeper.members(order.tree_id, main)
    assert [m.stopped for m in members] == [True, True]
    await both.keeper.signal(members, signal.SIGCONT)
    fifo.write_bytes(b"")
    deadline = time.monotonic() + WITHIN_S
    while len(members := await both.keeper.members(order.tree_id, main)) > 1:  # the child ends
        assert time.monotonic() < deadline
    until(lambda: state_of(main.pid) == "S", "the parent runs on")
    (member,) = await both.keeper.members(order.tree_id, main)
    assert not member.stopped


@pytest.mark.root
async def test_a_member_that_was_moved_out_of_the_group_stays_a_member(trees: LiveTrees) -> None:
    tree_id, main = await trees.shell("sleep 60 & wait")
    until(lambda: len(trees.sleepers()) == 1, "both run")
    group = trees.keeper._tie(tree_id)[1]
    if group is None or not group.exists():
        pytest.skip("needs a control group hierarchy of version 2 that may be written")
    (child,) = trees.marked() - {main.pid}
    (group.parent / "cgroup.procs").write_text(str(child))
    assert cgroups.pids(group) == [main.pid]
    deadline = time.monotonic() + WITHIN_S
    while pids(await trees.keeper.members(tree_id, main)) != {main.pid, child}:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_main_thread_that_ended_before_the_others_does_not_end_the_process(
    trees: LiveTrees,
) -> None:
    program = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start();"
        " ctypes.CDLL(None).pthread_exit(None)"
    )
    process = spawn(sys.executable, "-c", program)
    try:
        until(lambda: state_of(process.pid) == "Z", "the main thread has ended")
        main = await trees.keeper.identify(process.pid)
        assert await trees.keeper.is_alive(main)
        assert pids(await trees.keeper.members("adopted", main)) == {process.pid}
    finally:
        process.kill()
    process.wait(WITHIN_S)
    assert not await trees.keeper.is_alive(main)


async def test_a_zombie_has_ended(trees: LiveTrees) -> None:
    process = spawn("sleep", "60")
    main = await trees.keeper.identify(process.pid)
    process.kill()
    until(lambda: state_of(process.pid) == "Z", "it waits for its parent")
    assert not await trees.keeper.is_alive(main)
    assert await trees.keeper.members("adopted", main) == []
    with pytest.raises(errors.NotFound):
        await trees.keeper.identify(process.pid)
    process.wait()


@pytest.mark.parametrize("listed", [True, False])
async def test_a_family_is_found_whether_the_kernel_lists_children_or_not(
    both: LiveTrees, listed: bool
) -> None:
    tree_id, main = await both.shell(FAMILY)
    until(lambda: len(both.sleepers()) == 4, "the family is complete")
    both.keeper._lists_children = listed
    assert pids(await both.keeper.members(tree_id, main)) == both.marked()


async def test_a_look_at_a_tree_does_not_look_at_the_host(
    trees: LiveTrees, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, main = await trees.shell("sleep 60 & wait")
    until(lambda: len(trees.sleepers()) == 1, "both run")
    read: set[int] = set()

    def read_stat(pid: int) -> proc.Stat | None:
        read.add(pid)
        return original(pid)

    original = proc.read_stat
    monkeypatch.setattr(proc, "read_stat", read_stat)
    assert pids(await trees.keeper.members("adopted", main)) == trees.marked()
    assert read == trees.marked()


def test_a_pid_that_has_passed_to_a_stranger_is_no_descendant(
    stranger: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with spawn("sleep", "60") as main:
        monkeypatch.setattr(proc, "_children", lambda pid: [stranger.pid])
        assert set(proc.descend([main.pid])) == {main.pid}
        main.kill()


# -- who belongs where ----------------------------------------------------------------------------


async def test_processes_are_traced_to_their_trees(
    both: LiveTrees, stranger: subprocess.Popen[bytes]
) -> None:
    first, first_main = await both.shell(FAMILY, name="first")
    until(lambda: len(both.sleepers()) == 4, "the family is complete")
    family = both.marked()
    second, second_main = await both.shell("exec sleep 60", name="second")
    adopted = await both.keeper.identify(stranger.pid)
    mains = {first: first_main, second: second_main}
    asked = [*family, second_main.pid, stranger.pid, os.getpid(), 1 << 22]
    expected = {**dict.fromkeys(family, first), second_main.pid: second}
    assert await both.keeper.locate(asked, mains) == expected
    mains["adopted"] = adopted
    assert await both.keeper.locate(asked, mains) == {**expected, stranger.pid: "adopted"}


# -- signals --------------------------------------------------------------------------------------


async def test_a_signal_reaches_only_the_process_that_was_meant(
    trees: LiveTrees, stranger: subprocess.Popen[bytes]
) -> None:
    main = await trees.keeper.identify(stranger.pid)
    (member,) = await trees.keeper.members("adopted", main)
    successor = dataclasses.replace(member, start_ticks=member.start_ticks + 1)
    gone = spawn("true")
    gone.wait()
    vanished = dataclasses.replace(member, pid=gone.pid)
    await trees.keeper.signal([vanished, successor], signal.SIGKILL)
    assert stranger.poll() is None
    before = open_descriptors()
    await trees.keeper.signal([vanished, member], signal.SIGSTOP)
    until(lambda: state_of(stranger.pid) == "T", "it has stopped")
    assert (await trees.keeper.members("adopted", main))[0].stopped
    await trees.keeper.signal([member], signal.SIGCONT)
    until(lambda: state_of(stranger.pid) != "T", "it runs again")
    assert open_descriptors() == before


async def test_a_process_of_another_boot_is_nobody(
    trees: LiveTrees, stranger: subprocess.Popen[bytes]
) -> None:
    main = await trees.keeper.identify(stranger.pid)
    other = dataclasses.replace(main, boot_id="another")
    assert await trees.keeper.is_alive(main)
    assert not await trees.keeper.is_alive(other)
    assert await trees.keeper.members("adopted", other) == []
    assert await trees.keeper.wait_exit("adopted", other) == ExitStatus()


async def test_only_a_process_is_identified(trees: LiveTrees) -> None:
    ready, leave = threading.Event(), threading.Event()
    found = []

    def wait() -> None:
        found.append(threading.get_native_id())
        ready.set()
        leave.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert ready.wait(WITHIN_S)
        for pid in (*found, 1 << 22, 0, -1):
            with pytest.raises(errors.NotFound):
                await trees.keeper.identify(pid)
    finally:
        leave.set()
        thread.join()
    assert (await trees.keeper.identify(os.getpid())).pid == os.getpid()


async def test_oom_scores_are_set_and_given_back(
    trees: LiveTrees, stranger: subprocess.Popen[bytes]
) -> None:
    file = Path(f"/proc/{stranger.pid}/oom_score_adj")
    before = int(file.read_text())
    (member,) = await trees.keeper.members("adopted", await trees.keeper.identify(stranger.pid))
    successor = dataclasses.replace(member, start_ticks=member.start_ticks + 1)
    vanished = dataclasses.replace(member, pid=1 << 22)
    assert await trees.keeper.set_oom_score([successor, vanished], 700) == {}
    assert int(file.read_text()) == before
    assert await trees.keeper.set_oom_score([member, vanished], 700) == {member.pid: before}
    assert int(file.read_text()) == 700
    assert await trees.keeper.set_oom_score([member], {member.pid: 800, 1: 5}) == {member.pid: 700}
    assert int(file.read_text()) == 800
    assert await trees.keeper.set_oom_score([member], {}) == {}


# -- waiting --------------------------------------------------------------------------------------


async def test_five_hundred_can_wait_for_the_same_end(trees: LiveTrees) -> None:
    tree_id, main = await trees.shell("kill -STOP $$; exit 9")
    until(lambda: state_of(main.pid) == "T", "it has stopped itself")
    before = open_descriptors()
    async with asyncio.TaskGroup() as group:
        waits = [group.create_task(trees.keeper.wait_exit(tree_id, main)) for _ in range(500)]
        while open_descriptors() < before + 500:  # noqa: ASYNC110 - they signal nobody
            await asyncio.sleep(0)
        os.kill(main.pid, signal.SIGCONT)
    assert {wait.result() for wait in waits} == {ExitStatus(code=9)}
    assert open_descriptors() == before


async def test_a_cancelled_wait_leaves_nothing_open(
    trees: LiveTrees, stranger: subprocess.Popen[bytes]
) -> None:
    main = await trees.keeper.identify(stranger.pid)
    before = open_descriptors()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await trees.keeper.wait_exit("adopted", main)
    assert open_descriptors() == before


async def test_the_end_of_an_adopted_process_is_noticed_but_not_how(
    trees: LiveTrees, stranger: subprocess.Popen[bytes]
) -> None:
    main = await trees.keeper.identify(stranger.pid)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(trees.keeper.wait_exit("adopted", main))
        await asyncio.sleep(0)
        stranger.kill()
    assert waiting.result() == ExitStatus()
    assert await trees.keeper.exit_status("adopted") is None


# -- recovery -------------------------------------------------------------------------------------


async def test_what_runs_is_found_again_and_what_ended_is_not(trees: LiveTrees) -> None:
    order = trees.order("sleep", "60", env={**odd_environment(trees)}, groups=())
    main = await trees.keeper.launch(order)
    ended, ended_main = await trees.shell("exit 3", name="ended")
    await trees.keeper.wait_exit(ended, ended_main)
    never = trees.tree("never")
    never.mkdir()
    (never / "alive.lock").touch()
    (never.parent / ".not-a-tree").touch()
    keeper = trees.new_keeper()
    assert await keeper.leftovers() == [(order.tree_id, order, main)]
    assert await keeper.exit_status(ended) == ExitStatus(code=3)
    assert not never.exists(), "a start that came to nothing leaves nothing"
    await keeper.forget(ended)
    await keeper.forget(ended)
    assert not trees.tree(ended).exists()
    assert await keeper.exit_status(ended) is None


def odd_environment(trees: LiveTrees) -> dict[str, str]:
    key, _, value = trees.mark.partition("=")
    return {"PATH": os.defpath, key: value, "ODD": "\udcff\n\u20ac"}


async def test_a_process_with_the_pid_of_one_before_the_reboot_is_not_ours(
    trees: LiveTrees,
) -> None:
    tree_id, main = await trees.shell("exec sleep 60")
    record = trees.tree(tree_id) / "started.json"
    for change in ({"boot_id": "another"}, {"start_ticks": main.start_ticks - 1}):
        record.write_text(json.dumps({**dataclasses.asdict(main), **change}))
        assert await trees.new_keeper().leftovers() == []
    record.write_text("{torn")
    os.kill(json.loads((trees.tree(tree_id) / "alive.lock").read_text())["pid"], signal.SIGKILL)
    until(lambda: not trees.supervisors(), "the supervisor is gone")
    assert await trees.new_keeper().leftovers() == []


async def test_recovery_waits_for_a_start_that_is_under_way(trees: LiveTrees) -> None:
    order = trees.order("sleep", "60")
    main = await trees.keeper.launch(order)
    record = trees.tree(order.tree_id) / "started.json"
    hidden = record.with_name("hidden")
    record.rename(hidden)  # as it is between the fork and the record
    async with asyncio.TaskGroup() as group:
        finding = group.create_task(trees.new_keeper().leftovers())
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert not finding.done()
        hidden.rename(record)
    assert finding.result() == [(order.tree_id, order, main)]


async def test_a_start_that_hangs_is_ended(
    trees: LiveTrees, stranger: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees_module, "_STARTING_WAIT_S", 0.1)
    tree = trees.tree("hanging")
    tree.mkdir()
    lock = os.open(tree / "alive.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        identity = await trees.keeper.identify(stranger.pid)
        os.write(lock, json.dumps(dataclasses.asdict(identity)).encode())
        assert await trees.keeper.leftovers() == []
    finally:
        os.close(lock)
    assert stranger.wait(WITHIN_S) == -signal.SIGKILL
    assert not tree.exists()


async def test_an_adopted_tree_is_found_again(
    trees: LiveTrees, stranger: subprocess.Popen[bytes]
) -> None:
    main = await trees.keeper.identify(stranger.pid)
    order = trees.order()
    await trees.keeper.record_adopted(order, main)
    with pytest.raises(errors.AlreadyExists):
        await trees.keeper.record_adopted(order, main)
    keeper = trees.new_keeper()
    assert await keeper.leftovers() == [(order.tree_id, order, main)]
    assert pids(await keeper.members(order.tree_id, main)) == {stranger.pid}
    stranger.kill()
    assert await keeper.wait_exit(order.tree_id, main) == ExitStatus()
    await keeper.forget(order.tree_id)
    assert not trees.tree(order.tree_id).exists()


def test_an_identity_is_the_same_whoever_looks() -> None:
    mine = proc.identify(os.getpid())
    program = (
        "import dataclasses, json, sys; from gpusched.mechanisms import proc;"
        " print(json.dumps(dataclasses.asdict(proc.identify(int(sys.argv[1])))))"
    )
    theirs = subprocess.run(
        [sys.executable, "-c", program, str(os.getpid())],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert Identity(**json.loads(theirs.stdout)) == mine
