"""Thousands of malformed, oversized, half-sent and hostile requests: one error each, and the daemon as before."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched.protocol.codec import MAX_LINE_BYTES
from gpusched.protocol.methods import METHODS
from live import Line, running

#: Connections that send at the same time.
CLIENTS = 6
#: What each request of a well-behaved client may take meanwhile.
PATIENCE_S = 5.0

_TEXTS = [
    "",
    "\0",
    "../../etc/passwd",
    "a" * 100,
    "\ud800",
    "naïve",
    "%s%n",
    "-rf",
    "$(reboot)",
    "\r\n",
]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 2**31, 2**64, -(2**70), 1e308, [], {}, [[]], {"a": {}}),
    *_TEXTS,
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running() as daemon:
        yield daemon


def hostile(rng: random.Random) -> bytes:
    """One line that must be answered with exactly one error."""
    kind = rng.randrange(8)
    if kind == 0:  # no JSON at all
        return rng.randbytes(rng.randrange(200)).replace(b"\n", b"?")
    if kind == 1:  # a request that ends too early
        text = json.dumps({"method": "freeze", "params": {"name": "victim"}}).encode()
        return text[: rng.randrange(len(text))]
    if kind == 2:  # JSON, but no request
        return json.dumps(rng.choice(_VALUES)).encode()
    if kind == 3:  # no such method
        return json.dumps({"method": rng.choice(_VALUES), "id": rng.randrange(10**9)}).encode()
    if kind == 4:  # deep
        bracket = rng.choice([b"[", b'{"a":'])
        return b'{"method":"status","params":' + bracket * rng.randrange(1, 50_000)
    if kind == 5:  # long, but not too long
        return b'{"method":"' + b"x" * rng.randrange(200_000) + b'"}'
    # A method with parameters that it must refuse: no process has such a name.
    method = rng.choice(sorted(set(METHODS) - {"status", "subscribe", "snapshots"}))
    name = rng.choice([*_VALUES, "nobody", "no.body-1"])
    if (
        method == "adopt"
    ):  # its name is taken for as long as its pid is looked for: nobody else asks for this one
        name = "nobody-adopts"
    params: dict[str, Any] = {"name": name, "off": name, "on": name}
    for key in rng.sample(["gpu", "gpus", "force", "evict", "lines", "for_s", "copies"], 3):
        params[key] = rng.choice(_VALUES)
    params |= {"pid": rng.choice([0, -1, 2**22, 2**40, "1", True])}
    params |= {"cmd": rng.choice([[], "sh", [""], ["\0"], [1], {}, [["sh"]], None])}
    params |= {
        "dir": rng.choice(_TEXTS),
        "env": rng.choice([[], {"": ""}, {"a=b": ""}, {"\0": ""}]),
    }
    return json.dumps({"method": method, "params": params}).encode()


def attack(path: str, seed: int, count: int, failures: list[str]) -> None:
    """Sends ``count`` hostile lines, in batches and pieces, and counts the answers."""
    rng = random.Random(seed)
    line = Line(path)
    try:
        left = count
        while left:
            batch = [hostile(rng) for _ in range(min(left, rng.randrange(1, 8)))]
            left -= len(batch)
            data = b"".join(text + b"\n" for text in batch)
            cut = rng.randrange(len(data))
            line.send_bytes(data[:cut])
            line.send_bytes(data[cut:])
            for text in batch:
                answer = line.read()
                if answer.get("ok") is not False or type(answer.get("error")) is not str:
                    failures.append(f"seed {seed}: {text[:200]!r} got {answer}")
            if rng.random() < 0.1:
                line = misbehave(line, path, rng, failures)
        line.send({"method": "status", "id": seed})
        if line.read().get("id") != seed:
            failures.append(f"seed {seed}: one answer too many")
    except Exception as error:  # noqa: BLE001 - the thread's only way to tell
        failures.append(f"seed {seed}: {error!r}")
    finally:
        line.close()


def misbehave(line: Line, path: str, rng: random.Random, failures: list[str]) -> Line:
    """Leaves in a rude way; a new connection comes back."""
    with contextlib.suppress(BrokenPipeError):
        match rng.randrange(3):
            case 0:  # in the middle of a request
                line.send_bytes(hostile(rng)[:50])
            case 1:  # without reading the answers
                line.send(*({"method": "status"} for _ in range(5)))
            case _:  # with a line that is too long
                line.send_bytes(b"x" * MAX_LINE_BYTES * 2)
                if line.read().get("code") != "invalid_request" or not line.is_closed():
                    failures.append("a line that is too long was not refused")
    line.close()
    return Line(path)


def serve_meanwhile(path: str, done: threading.Event, slowest: list[float]) -> None:
    with Line(path) as line:
        while not done.is_set():
            begun = time.monotonic()
            assert line.ask("status")["ok"]
            slowest.append(time.monotonic() - begun)


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def assault(daemon: PrivateDaemon, seed: int, count: int) -> list[float]:
    """``count`` hostile requests from CLIENTS connections at once; the times of a bystander's requests."""
    failures: list[str] = []
    slowest: list[float] = []
    done = threading.Event()
    bystander = threading.Thread(target=serve_meanwhile, args=(daemon.socket, done, slowest))
    attackers = [
        threading.Thread(target=attack, args=(daemon.socket, seed + n, count // CLIENTS, failures))
        for n in range(CLIENTS)
    ]
    for thread in (bystander, *attackers):
        thread.start()
    for thread in attackers:
        thread.join()
    done.set()
    bystander.join()
    assert not failures, failures[:5]
    return slowest


def test_ten_thousand_hostile_requests_are_one_error_each(
    daemon: PrivateDaemon, soak: bool
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    assault(daemon, seed, 1200)  # memory and threads that stay are taken now
    before = descriptors(daemon.pid), threads(daemon.pid), rss_mb(daemon.pid)
    slowest = assault(daemon, seed + 1000, 100_000 if soak else 10_000)
    assert max(slowest) < PATIENCE_S
    wait_until(
        lambda: descriptors(daemon.pid) <= before[0],
        within_s=10,
        what=f"descriptors are back at {before[0]}",
    )
    assert threads(daemon.pid) <= before[1] + 2  # pools may not have been full before
    assert rss_mb(daemon.pid) < before[2] + 30
    assert "Traceback" not in daemon.log_text() and "ERROR" not in daemon.log_text()
    with Line(daemon.socket) as line:
        assert line.result("status")["processes"] == []


def test_clients_that_do_not_read_cost_the_others_nothing(daemon: PrivateDaemon) -> None:
    deaf = [Line(daemon.socket) for _ in range(20)]
    for line in deaf:
        line.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                line.socket.send(b'{"method":"status"}\n' * 100)
    with Line(daemon.socket) as line:
        for _ in range(50):
            assert line.ask("status")["ok"]
    before = descriptors(daemon.pid)
    for line in deaf:
        line.close()
    wait_until(
        lambda: descriptors(daemon.pid) <= before - 20, within_s=10, what="20 descriptors are free"
    )


def test_streams_whose_client_is_gone_end(daemon: PrivateDaemon) -> None:
    """Also where nothing is ever sent that could fail."""
    with Line(daemon.socket) as line:
        line.result("run", name="silent", cmd=["sleep", "1000"])
        follow = {"method": "logs", "params": {"name": "silent", "follow": True}}
        before = descriptors(daemon.pid)
        for request in [follow, {"method": "subscribe"}] * 20:
            with Line(daemon.socket) as stream:
                stream.send(request)
                assert stream.read()["ok"]
        # A few less than one for each stream: other work opens and closes descriptors too.
        wait_until(
            lambda: descriptors(daemon.pid) <= before + 3,
            within_s=10,
            what=f"descriptors are back at {before}",
        )
        line.result("kill", name="silent")
