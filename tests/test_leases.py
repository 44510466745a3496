"""Leases: who holds them, what they stop, and how they end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from daemons import PrivateDaemon, wait_until
from live import Line, ask, error_of, process, running, start, state, wait_state


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running(vram="64M") as daemon:
        yield daemon


@pytest.fixture
def job(daemon: PrivateDaemon) -> Iterator[str]:
    ask(daemon, "run", name="job", cmd=["sleep", "1000"])
    yield "job"
    ask(daemon, "kill", name="job", force=True)


@pytest.fixture
def holder(daemon: PrivateDaemon) -> Iterator[Line]:
    with Line(daemon.socket) as line:
        yield line


def wait_leases(daemon: PrivateDaemon, wanted: int, within_s: float = 10.0) -> None:
    wait_until(
        lambda: process(daemon, "job")["leases"] == wanted,
        within_s=within_s,
        what=f"{wanted} leases",
    )


def test_a_lease_stops_others_and_not_its_holder(
    daemon: PrivateDaemon, job: str, holder: Line
) -> None:
    holder.result("acquire", name=job)
    ask(daemon, "run", name="other", cmd=["sleep", "1000"])
    ask(daemon, "freeze", name="other")
    for method, params in (
        ("freeze", {"name": job}),
        ("kill", {"name": job}),
        ("swap", {"off": job, "on": "other"}),
        ("swap", {"off": [job], "on": ["other"]}),
    ):
        answer = error_of(daemon, method, **params)
        assert answer["code"] == "lease_held" and answer["retryable"], answer
        assert answer["details"]["leases"] == 1
    assert (state(daemon, job), state(daemon, "other")) == ("active", "frozen")
    assert ask(daemon, "thaw", name=job)["from_tier"] == "gpu"  # takes nothing away
    assert holder.result("freeze", name=job)["tier"] == "ram"
    ask(daemon, "kill", name="other")


@pytest.mark.parametrize("method", ["freeze", "kill"])
def test_force_goes_over_a_lease(
    daemon: PrivateDaemon, job: str, holder: Line, method: str
) -> None:
    holder.result("acquire", name=job)
    assert ask(daemon, method, name=job, force=True)["name"] == job
    if method == "kill":
        assert holder.code("acquire", name=job) == "not_found"
        ask(daemon, "run", name=job, cmd=["sleep", "1000"])
        assert process(daemon, job)["leases"] == 0


def test_a_lease_ends_with_its_connection(daemon: PrivateDaemon, job: str) -> None:
    with Line(daemon.socket) as line:
        line.result("acquire", name=job)
        line.result("acquire", name=job)
        assert process(daemon, job)["leases"] == 2
    wait_leases(daemon, 0)
    assert ask(daemon, "freeze", name=job)["tier"] == "ram"


def test_release_ends_the_callers_leases_only(
    daemon: PrivateDaemon, job: str, holder: Line
) -> None:
    holder.result("acquire", name=job)
    with Line(daemon.socket) as other:
        other.result("acquire", name=job)
        assert other.result("release", name=job)["released"] == 1
        assert other.result("release", name=job)["released"] == 0
        assert other.code("freeze", name=job) == "lease_held"
    assert holder.result("release", name=job)["released"] == 1
    assert ask(daemon, "freeze", name=job)["tier"] == "ram"


def test_acquire_thaws(daemon: PrivateDaemon, job: str, holder: Line) -> None:
    ask(daemon, "freeze", name=job)
    assert holder.result("acquire", name=job)["from_tier"] == "ram"
    assert (state(daemon, job), process(daemon, job)["leases"]) == ("active", 1)
    assert holder.result("acquire", name=job)["from_tier"] == "gpu"


def test_a_timed_lease_outlives_its_connection_and_ends_by_itself(
    daemon: PrivateDaemon, job: str
) -> None:
    begun = time.monotonic()
    assert ask(daemon, "acquire", name=job, for_s=1.5)["expires_s"] == 1.5
    answer = error_of(daemon, "freeze", name=job)
    assert answer["code"] == "lease_held"
    assert 0 < answer["details"]["expires_in_s"] <= 1.5
    wait_leases(daemon, 0)
    assert time.monotonic() - begun >= 1.4
    assert ask(daemon, "freeze", name=job)["tier"] == "ram"


def test_another_connection_of_the_user_releases_a_timed_lease(
    daemon: PrivateDaemon, job: str
) -> None:
    ask(daemon, "acquire", name=job, for_s=100)
    assert ask(daemon, "release", name=job)["released"] == 1
    assert ask(daemon, "freeze", name=job)["tier"] == "ram"


def test_leases_end_with_the_process(daemon: PrivateDaemon, job: str, holder: Line) -> None:
    ask(daemon, "run", name="brief", cmd=["sleep", "0.2"])
    holder.result("acquire", name="brief")
    holder.result("acquire", name="brief", for_s=100)
    wait_state(daemon, "brief", "dead")
    assert process(daemon, "brief")["leases"] == 0
    assert holder.code("acquire", name="brief") == "process_exited"
    assert ask(daemon, "kill", name="brief") == {"name": "brief"}


def test_a_client_that_goes_in_the_middle_of_acquire_leaves_no_lease(
    daemon: PrivateDaemon, slow_restore: None
) -> None:
    start(daemon, "job")
    ask(daemon, "freeze", name="job")
    with Line(daemon.socket) as line:
        line.send({"method": "acquire", "params": {"name": "job"}})
        wait_state(daemon, "job", "thawing")
    wait_state(daemon, "job", "active")
    wait_leases(daemon, 0)
    assert ask(daemon, "freeze", name="job")["tier"] == "ram"
    ask(daemon, "kill", name="job")


@pytest.fixture
def slow_restore(daemon: PrivateDaemon) -> Iterator[None]:
    from gpusched.mechanisms.sim.script import Script

    script = Script(daemon.sim_dir)
    script.add("restore", delay_s=0.5)
    yield
    script.clear()


@pytest.mark.parametrize("was", ["active", "frozen"])
def test_timed_leases_survive_the_daemon(daemon: PrivateDaemon, job: str, was: str) -> None:
    with Line(daemon.socket) as holder:
        holder.result("acquire", name=job)
        if was == "frozen":
            holder.result("freeze", name=job)
        lease = ask(daemon, "acquire", name=job, for_s=100)["lease"]
        assert lease in (daemon.state_dir / "journal").read_text()
        daemon.restart()
        assert process(daemon, job)["leases"] == 1  # the connection's has ended with it
    assert error_of(daemon, "freeze", name=job)["code"] == "lease_held"
    assert ask(daemon, "release", name=job)["released"] == 1
    daemon.restart()
    assert process(daemon, job)["leases"] == 0
    assert ask(daemon, "freeze", name=job)["tier"] == "ram"
