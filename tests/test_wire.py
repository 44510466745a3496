"""The wire as clients know it, line by line, against the real daemon on simulated GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

import original_sdk
from daemons import PrivateDaemon, wait_until
from gpusched.protocol.codec import MAX_LINE_BYTES
from gpusched.protocol.methods import METHODS
from live import Line, ask, prove_contents, running, start, state, workload

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
AGE = re.compile(r"(\d+[dhms])+")


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running(gpus=2, vram="12M") as daemon:
        yield daemon


@pytest.fixture
def line(daemon: PrivateDaemon) -> Iterator[Line]:
    with Line(daemon.socket) as line:
        yield line


@pytest.fixture
def name(daemon: PrivateDaemon) -> Iterator[str]:
    """A ready workload of 8 MiB on GPU 0."""
    start(daemon, "job")
    yield "job"
    with Line(daemon.socket) as line:
        line.ask("kill", name="job", force=True)


@pytest.fixture(scope="module")
def idle(daemon: PrivateDaemon) -> str:
    """A process that every bad request leaves alone."""
    ask(daemon, "run", name="idle", cmd=["sleep", "1000"])
    return "idle"


def require(found: dict[str, Any], **types: type) -> None:
    """Each field is there with exactly that JSON type (bool is no int)."""
    for key, wanted in types.items():
        assert type(found[key]) is wanted, (key, found)


# -- results --------------------------------------------------------------------------------------


def test_run_and_kill(line: Line) -> None:
    result = line.result("run", name="a", cmd=["sleep", "1000"], gpu=0)
    require(result, name=str, pid=int)
    assert result["name"] == "a"
    assert line.result("kill", name="a") == {"name": "a"}
    assert line.code("kill", name="a") == "not_found"


def test_freeze_and_thaw(line: Line, name: str) -> None:
    frozen = line.result("freeze", name=name)
    require(frozen, name=str, duration_ms=int, tier=str, mem_mb=int)
    assert (frozen["name"], frozen["tier"], frozen["mem_mb"]) == (name, "ram", 8)
    thawed = line.result("thaw", name=name)
    require(thawed, name=str, duration_ms=int, from_tier=str, mem_mb=int)
    assert (thawed["name"], thawed["from_tier"], thawed["mem_mb"]) == (name, "ram", 8)


def test_a_goal_already_reached_is_a_success(line: Line, name: str) -> None:
    thawed = line.result("thaw", name=name)
    assert (thawed["duration_ms"], thawed["from_tier"], thawed["mem_mb"]) == (0, "gpu", 8)
    line.result("freeze", name=name)
    frozen = line.result("freeze", name=name)
    assert (frozen["duration_ms"], frozen["tier"], frozen["mem_mb"]) == (0, "ram", 8)
    moved = line.result("migrate", name=name, gpu=0)
    assert (moved["from_gpu"], moved["to_gpu"]) == (0, 0)
    assert line.result("release", name=name)["released"] == 0


def test_migrate(line: Line, name: str) -> None:
    result = line.result("migrate", name=name, gpu=1)
    require(result, name=str, from_gpu=int, to_gpu=int)
    assert (result["name"], result["from_gpu"], result["to_gpu"]) == (name, 0, 1)


def test_swap_acquire_and_release(line: Line, name: str) -> None:
    line.result("run", name="other", cmd=["sleep", "1000"])
    line.result("freeze", name="other")
    swapped = line.result("swap", off=name, on="other")
    require(swapped, duration_ms=int, off=list, on=list)
    assert [r["name"] for r in swapped["off"]] == [name]
    assert [r["name"] for r in swapped["on"]] == ["other"]
    lease = line.result("acquire", name=name)
    require(lease, name=str, lease=str, duration_ms=int, from_tier=str, mem_mb=int)
    assert lease["expires_s"] is None
    assert line.result("acquire", name=name, for_s=5)["expires_s"] == 5
    assert line.result("release", name=name) == {"name": name, "released": 2}
    line.result("kill", name="other")


def test_logs(line: Line) -> None:
    line.result("run", name="talker", cmd=["sh", "-c", "seq 120; exec sleep 1000"])
    wait_until(
        lambda: "120" in line.result("logs", name="talker")["lines"], within_s=10, what="120 lines"
    )
    result = line.result("logs", name="talker")
    require(result, name=str, lines=list, output=str)
    assert result["lines"] == [str(n) for n in range(71, 121)]
    assert result["output"] == "\n".join(result["lines"])
    assert line.result("logs", name="talker", lines=0)["lines"] == result["lines"]
    assert line.result("logs", name="talker", lines=3)["lines"] == ["118", "119", "120"]
    for everything in (-1, 10**30):
        assert len(line.result("logs", name="talker", lines=everything)["lines"]) == 120
    line.result("kill", name="talker")


@pytest.mark.parametrize("method", ["hibernate", "fork"])
def test_what_has_no_namespaces_of_its_own_stays_off_the_disk(line: Line, method: str) -> None:
    line.result("run", name="plain", cmd=workload("2M"), isolate=False)
    assert line.code(method, name="plain") == "unsupported"
    assert line.code(method, name="nobody") == "not_found"
    line.result("kill", name="plain")


def test_status(line: Line, name: str) -> None:
    line.result("freeze", name=name)
    status = line.result("status")
    require(status, gpus=list, processes=list, memory=dict, metrics=dict, recent_events=list)
    for gpu in status["gpus"]:
        require(gpu, index=int, name=str, mem_total_mb=int, mem_used_mb=int, mem_free_mb=int)
    found = next(p for p in status["processes"] if p["name"] == name)
    require(found, name=str, pid=int, state=str, gpu=int, mem_mb=int, age=str, started=str)
    assert (found["state"], found["tier"], found["gpu"], found["mem_mb"]) == ("frozen", "ram", 0, 8)
    assert AGE.fullmatch(found["age"]) and RFC3339.fullmatch(found["started"])
    sizes = "host_ram_total_mb host_ram_free_mb host_ram_budget_mb snapshots_mb disk_used_mb"
    require(status["memory"], **dict.fromkeys([*sizes.split(), "disk_budget_mb"], int))
    assert status["memory"]["snapshots_mb"] == 8
    counts = "requests cache_hits freezes thaws forks migrations hibernations cold_starts"
    require(
        status["metrics"],
        **dict.fromkeys([*counts.split(), "avg_freeze_ms", "avg_thaw_ms"], int),
    )
    require(status["capabilities"], cuda_checkpoint=bool, criu=bool, driver_version=str)
    for event in status["recent_events"]:
        require(event, time=str, type=str)
        assert RFC3339.fullmatch(event["time"])
        assert type(event.get("duration_ms", 0)) is int
    assert len(status["recent_events"]) <= 20


def test_every_method_of_the_table_was_asked_here() -> None:
    asked = "run kill freeze thaw migrate swap acquire release logs hibernate fork status"
    elsewhere = "adopt subscribe snapshots verify_snapshot delete_snapshot"
    assert {*asked.split(), *elsewhere.split()} == set(METHODS)


def test_subscribe_sends_a_status_and_then_each_event(daemon: PrivateDaemon, name: str) -> None:
    with Line(daemon.socket) as events, Line(daemon.socket) as line:
        events.send({"method": "subscribe", "id": 7})
        opening = events.read()
        assert opening["ok"] and opening["id"] == 7 and opening["result"]["processes"]
        line.result("freeze", name=name)
        line.result("freeze", name=name)  # nothing happens, so nothing is told
        line.result("thaw", name=name)
        told = [events.read(), events.read()]
        assert [(e["type"], e["process"]) for e in told] == [("freeze", name), ("thaw", name)]
        for event in told:
            assert type(event["duration_ms"]) is int and RFC3339.fullmatch(event["time"])


# -- parameters -----------------------------------------------------------------------------------


def test_unknown_parameters_and_fields_are_ignored(line: Line) -> None:
    line.send({"method": "status", "params": {"verbose": True}, "jsonrpc": "2.0", "auth": [1]})
    assert line.read()["ok"]
    empty: dict[str, Any] = {}
    for params in (None, empty):
        line.send({"method": "status", "params": params})
        assert line.read()["ok"]


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("freeze", {}),
        ("freeze", {"name": 1}),
        ("freeze", {"name": None}),
        ("freeze", {"name": "idle", "force": 1}),
        ("freeze", {"name": "\ud800"}),
        ("run", {"name": "x", "cmd": ["\ud800"]}),
        ("freeze", {"name": "idle", "force": "yes"}),
        ("freeze", []),
        ("freeze", "idle"),
        ("freeze", False),
        ("run", {"name": "x"}),
        ("run", {"name": "x", "cmd": "sleep 5"}),
        ("run", {"name": "x", "cmd": []}),
        ("run", {"name": "x", "cmd": [""]}),
        ("run", {"name": "x", "cmd": ["sleep", 5]}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpu": True}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpu": 0.0}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpu": 1e300}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpu": -1}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpu": 2}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpu": 10**40}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpus": [0, 0]}),
        ("run", {"name": "x", "cmd": ["sleep"], "gpus": []}),
        ("run", {"name": "x", "cmd": ["sleep"], "dir": "relative"}),
        ("run", {"name": "x", "cmd": ["sleep"], "env": {"A=B": "c"}}),
        ("run", {"name": "x", "cmd": ["sleep"], "env": {"A": 1}}),
        ("run", {"name": "x", "cmd": ["/no/such/program"]}),
        ("run", {"name": "x", "cmd": ["true"], "dir": "/no/such/directory"}),
        ("run", {"name": "../x", "cmd": ["true"]}),
        ("run", {"name": "x\n", "cmd": ["true"]}),
        ("run", {"name": "", "cmd": ["true"]}),
        ("run", {"name": "x" * 65, "cmd": ["true"]}),
        ("migrate", {"name": "idle"}),
        ("migrate", {"name": "idle", "gpu": True}),
        ("migrate", {"name": "idle", "gpu": 9}),
        ("adopt", {"name": "x", "pid": 1.0}),
        ("adopt", {"name": "x", "pid": -1}),
        ("acquire", {"name": "idle", "for_s": 0}),
        ("acquire", {"name": "idle", "for_s": True}),
        ("acquire", {"name": "idle", "for_s": 1e12}),
        ("logs", {"name": "idle", "lines": 2.0}),
        ("logs", {"name": "idle", "lines": "all"}),
        ("swap", {"off": "idle"}),
        ("swap", {"off": "idle", "on": "idle"}),
        ("swap", {"off": [], "on": []}),
        ("nonsense", {}),
        (None, {}),
        (5, {}),
        ({"a": 1}, {}),
    ],
)
def test_bad_parameters_are_one_error_and_the_connection_goes_on(
    line: Line, idle: str, method: Any, params: Any
) -> None:
    line.send({"method": method, "params": params, "id": "x"})
    answer = line.read()
    assert (answer["ok"], answer["code"], answer["id"]) == (False, "invalid_request", "x"), answer
    assert type(answer["error"]) is str and type(answer["retryable"]) is bool
    assert type(answer["details"]) is dict
    found = line.result("status")["processes"]
    assert [(p["name"], p["state"]) for p in found] == [(idle, "active")]


# -- framing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_id", [0, -1, 2**70, 1.5, "", "ü\n", "\ud800", True, None])
def test_an_id_comes_back_as_it_was(line: Line, request_id: Any) -> None:
    line.send({"id": request_id, "method": "status"}, {"id": request_id, "method": "nonsense"})
    for ok in (True, False):
        answer = line.read()
        assert (answer["ok"], answer["id"]) == (ok, request_id)
        assert type(answer["id"]) is type(request_id)
    line.send({"method": "status"})
    assert "id" not in line.read()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"   ",
        b"nonsense",
        b"[]",
        b"null",
        b'"freeze"',
        b"{}",
        b'{"method"}',
        b'{"method":"status"',
        b'{"method":"status"} trailing',
        b'{"method":"status","id":NaN}',
        b'{"method":"status","id":-Infinity}',
        b'{"method":"status","id":1e999}',
        b'{"method":"status","id":[1]}',
        b'{"method":"status","id":{}}',
        b'{"method":"\xff\xfe"}',
        b"\x00\x01\x02",
        b"[" * 100_000,
        b'{"method":"status","id":' + b"9" * 5000 + b"}",
        b'{"method":"status","params":' + b'{"a":' * 50_000,
        b'{"method":' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)
def test_what_is_no_request_is_one_error(line: Line, text: bytes) -> None:
    line.send_bytes(text + b"\n" + b'{"method":"status"}\n')
    answer = line.read()
    assert (answer["ok"], answer["code"]) == (False, "invalid_request"), answer
    assert line.read()["ok"]


def test_requests_may_come_in_pieces_and_many_at_once(line: Line) -> None:
    request = b'{"id":1,"method":"status"}\r\n'
    for at in range(len(request)):
        line.send_bytes(request[at : at + 1])
    assert line.read()["id"] == 1
    line.send(*({"id": n, "method": "status" if n % 2 else "nonsense"} for n in range(200)))
    assert [line.read()["id"] for _ in range(200)] == list(range(200))


def test_a_half_sent_request_is_not_carried_out(daemon: PrivateDaemon, line: Line) -> None:
    with Line(daemon.socket) as other:
        other.send_bytes(b'{"method":"run","params":{"name":"half","cmd":["sleep","1000"]}}')
    assert "half" not in [p["name"] for p in line.result("status")["processes"]]


def test_a_line_just_below_a_mebibyte_is_served(line: Line) -> None:
    start = b'{"method":"status","pad":"'
    line.send_bytes(start + b"x" * (MAX_LINE_BYTES - len(start) - 3) + b'"}\n')
    assert line.read()["ok"]


@pytest.mark.parametrize("size", [MAX_LINE_BYTES, 3 * MAX_LINE_BYTES])
def test_a_line_of_a_mebibyte_is_one_error_and_may_end_the_connection(
    daemon: PrivateDaemon, line: Line, size: int
) -> None:
    try:
        line.send_bytes(b"x" * size + b"\n")
    except BrokenPipeError:
        assert size > MAX_LINE_BYTES  # it need not read the rest
    answer = line.read()
    assert (answer["ok"], answer["code"]) == (False, "invalid_request")
    assert line.is_closed()
    with Line(daemon.socket) as other:
        assert other.ask("status")["ok"]


# -- the loop of the first users ------------------------------------------------------------------


@pytest.fixture
def models(daemon: PrivateDaemon) -> Iterator[None]:
    """Policy and reward, 8 MiB each: together more than GPU 0 has. Policy is active."""
    sdk = original_sdk.GpuSched(daemon.socket)
    sdk.run("reward", workload("8M", "--seed", "2"), gpu=0)
    sdk.wait_ready("reward", poll=0.05)
    sdk.freeze("reward")
    sdk.run("policy", workload("8M", "--seed", "1"), gpu=0)
    sdk.wait_ready("policy", poll=0.05)
    yield
    for model in ("policy", "reward"):
        sdk.kill(model)


@pytest.mark.usefixtures("models")
def test_the_original_sdk_runs_the_original_loop(daemon: PrivateDaemon) -> None:
    sdk = original_sdk.GpuSched(daemon.socket)
    for _ in range(100):
        sdk.freeze("reward")
        sdk.thaw("policy")
        for off, on in (("policy", "reward"), ("reward", "policy")):
            frozen, thawed = sdk.swap(off, on)
            assert (frozen["tier"], thawed["from_tier"]) == ("ram", "ram")
    prove_contents(daemon, "policy")
    sdk.swap("policy", "reward")
    prove_contents(daemon, "reward")
    assert sdk.status()["metrics"]["freezes"] >= 200


@pytest.mark.usefixtures("models")
def test_raw_lines_run_the_original_loop(daemon: PrivateDaemon, line: Line, soak: bool) -> None:
    for _ in range(100 if soak else 15):
        line.result("freeze", name="reward")
        line.result("thaw", name="policy")
        for off, on in (("policy", "reward"), ("reward", "policy")):
            assert line.result("freeze", name=off)["tier"] == "ram"
            assert line.result("thaw", name=on)["from_tier"] == "ram"
            assert (state(daemon, off), state(daemon, on)) == ("frozen", "active")
    prove_contents(daemon, "policy")
    line.result("swap", off="policy", on="reward")
    prove_contents(daemon, "reward")


@pytest.mark.usefixtures("models")
def test_the_original_sdk_is_told_why_a_thaw_does_not_fit(daemon: PrivateDaemon) -> None:
    sdk = original_sdk.GpuSched(daemon.socket)
    with pytest.raises(RuntimeError, match=r"reward needs 8 MiB on GPU 0; 4 MiB would be free"):
        sdk.thaw("reward")
    assert state(daemon, "reward") == "frozen"
    assert sdk.gpu_free_mb(0) == 4


def test_status_is_whole_whatever_id_is_to_be_echoed(daemon: PrivateDaemon) -> None:
    """An id that strict JSON cannot carry goes another way; the processes must not get lost on it."""
    with Line(daemon.socket) as line:
        line.result("run", name="echoed", cmd=["sleep", "60"])
        line.send_bytes(b'{"method":"status","id":"\\ud800"}\n')
        answer = line.read()
        line.result("kill", name="echoed")
    assert answer["id"] == "\ud800"
    assert "echoed" in [p["name"] for p in answer["result"]["processes"]]
