"""Two clients at the same process at once: every answer is right, and the state never contradicts the driver."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from daemons import PrivateDaemon
from gpusched.ports import DriverState
from live import Line, ask, driver_state, find, is_alive, process, prove_contents, running, start

#: What may go wrong for a request that is right in itself but comes second.
_KILLED_FIRST = {"not_found", "process_exited"}
_OF_STATE = {"active": DriverState.RUNNING, "frozen": DriverState.CHECKPOINTED}


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running(vram="64M") as daemon:
        yield daemon


def play(
    daemon: PrivateDaemon,
    seed: int,
    rounds: int,
    methods: list[str],
    allowed: set[str],
    bad: list[str],
) -> None:
    """Sends random requests for ``job``; notes answers that cannot be right."""
    rng = random.Random(seed)
    right = {"freeze": ("tier", {"ram"}), "thaw": ("from_tier", {"ram", "gpu"})}
    with Line(daemon.socket) as line:
        for _ in range(rounds):
            method = rng.choice(methods)
            answer = line.ask(method, name="job")
            if not answer["ok"]:
                if answer["code"] not in allowed:
                    bad.append(f"{method}: {answer}")
            elif method in right:
                key, values = right[method]
                if answer["result"][key] not in values or answer["result"]["mem_mb"] != 8:
                    bad.append(f"{method}: {answer}")


def at_once(daemon: PrivateDaemon, seed: int, rounds: int, methods: list[list[str]]) -> None:
    bad: list[str] = []
    allowed = _KILLED_FIRST if any("kill" in each for each in methods) else set()
    players = [
        threading.Thread(target=play, args=(daemon, seed + n, rounds, each, allowed, bad))
        for n, each in enumerate(methods)
    ]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert not bad, (seed, bad[:5])


def test_freezing_and_thawing_the_same_process_at_once(daemon: PrivateDaemon, soak: bool) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    pid = start(daemon, "job")
    moves = ["freeze", "thaw"]
    for batch in range(40 if soak else 8):
        at_once(daemon, seed + 10 * batch, 10, [moves, moves])
        now = process(daemon, "job")
        assert now["op"] is None
        assert driver_state(daemon, pid) is _OF_STATE[now["state"]], now
    ask(daemon, "thaw", name="job")
    prove_contents(daemon, "job")
    ask(daemon, "kill", name="job")


def test_killing_what_another_client_freezes_and_thaws(daemon: PrivateDaemon, soak: bool) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    for batch in range(60 if soak else 10):
        pid = start(daemon, "job")
        moves = ["freeze", "thaw"]
        at_once(daemon, seed + 10 * batch, 6, [moves, [*moves, *moves, "kill"]])
        now = find(daemon, "job")
        if now is None:
            assert not is_alive(pid)
            assert driver_state(daemon, pid) is DriverState.NONE
        else:
            assert driver_state(daemon, pid) is _OF_STATE[now["state"]], now
            ask(daemon, "kill", name="job")
    status = ask(daemon, "status")
    assert status["processes"] == []
    assert status["gpus"][0]["mem_used_mb"] == 0
    assert status["memory"]["snapshots_mb"] == 0


def test_both_may_kill(daemon: PrivateDaemon) -> None:
    for _ in range(5):
        ask(daemon, "run", name="job", cmd=["sleep", "1000"])
        at_once(daemon, 0, 1, [["kill"], ["kill"], ["kill"]])
        assert find(daemon, "job") is None


def test_only_one_of_two_runs_gets_the_name(daemon: PrivateDaemon) -> None:
    for _ in range(5):
        codes: list[str] = []

        def run(codes: list[str] = codes) -> None:
            with Line(daemon.socket) as line:
                answer = line.ask("run", name="job", cmd=["sleep", "1000"])
                codes.append("ok" if answer["ok"] else answer["code"])

        players = [threading.Thread(target=run) for _ in range(3)]
        for player in players:
            player.start()
        for player in players:
            player.join()
        assert sorted(codes) == ["already_exists", "already_exists", "ok"]
        ask(daemon, "kill", name="job")


def test_opposite_swaps_at_once_never_leave_both_on_a_gpu_for_one(daemon: PrivateDaemon) -> None:
    start(daemon, "left", "40M", "--seed", "1")
    ask(daemon, "freeze", name="left")
    start(daemon, "right", "40M", "--seed", "2")
    bad: list[str] = []

    def swap(off: str, on: str) -> None:
        with Line(daemon.socket) as line:
            for _ in range(8):
                answer = line.ask("swap", off=off, on=on)
                if not answer["ok"]:
                    bad.append(str(answer))

    players = [
        threading.Thread(target=swap, args=pair) for pair in (("left", "right"), ("right", "left"))
    ]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert not bad, bad[0]
    states = {name: process(daemon, name)["state"] for name in ("left", "right")}
    assert sorted(states.values()) == ["active", "frozen"]
    on = next(name for name, found in states.items() if found == "active")
    off = next(name for name, found in states.items() if found == "frozen")
    prove_contents(daemon, on)
    ask(daemon, "swap", off=on, on=off)
    prove_contents(daemon, off)
    for name in states:
        ask(daemon, "kill", name=name)


def test_a_swap_with_one_empty_side_moves_several_as_one_or_none(daemon: PrivateDaemon) -> None:
    """``left`` and ``right`` cannot be on the GPU together: neither comes on, and whoever was off stays off."""
    for name, size in (("left", "40M"), ("right", "40M"), ("small", "8M")):
        start(daemon, name, size)
        if name != "small":
            ask(daemon, "freeze", name=name)
    with Line(daemon.socket) as line:
        assert line.code("swap", off=[], on=["left", "right"]) == "insufficient_gpu_memory"
        assert {process(daemon, name)["state"] for name in ("left", "right")} == {"frozen"}
        assert [r["from_tier"] for r in line.result("swap", off=[], on=["left"])["on"]] == ["ram"]
        off = line.result("swap", off=["left", "small"], on=[])
        assert ([r["tier"] for r in off["off"]], off["on"]) == (["ram", "ram"], [])
        assert line.code("swap", off=[], on=[]) == "invalid_request"
    for name in ("left", "right", "small"):
        ask(daemon, "kill", name=name)
