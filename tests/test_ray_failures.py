"""What may die, and what then becomes of a model, its calls and its host: each row of the table in docs/ray.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from daemons import ROOT, PrivateDaemon, wait_until
from gpusched.client import GpuSched
from gpusched.errors import DaemonUnavailable, LeaseHeld
from gpusched.mechanisms.sim.script import Script
from ray_cluster import await_no_hosts, get, names, states
from ray_integration import agent, exchange, freeze, status, swap, thaw

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
MIB = 2**20
LARGE = 75 * MIB
#: "Hosts gone within 10 s of their actor's final death."
GONE_S = 10.0


def kill_proxy(model: Any) -> int:
    """SIGKILL for the Ray worker alone; its pid."""
    pid = get(status(model))["calls"]["proxy_pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}/fd").exists(), within_s=5, what="the proxy is gone")
    return int(pid)


# -- the host -------------------------------------------------------------------------------------


def test_a_host_that_crashes_ends_its_actor_which_ray_restarts_as_often_as_it_may(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    model = make("crashing", max_restarts=1)
    get(model.add.remote(5))
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        get(model.crash.remote())
    wait_until(lambda: _answers(model), within_s=20, what="the actor is restarted")
    assert get(model.add.remote(0)) == 0, "a new host has a new model"
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(model.crash.remote())
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(model.add.remote())
    await_no_hosts(cluster, "crashing", within_s=GONE_S)


def _answers(model: Any) -> bool:
    try:
        get(model.history.remote())
    except ray.exceptions.ActorUnavailableError:
        return False
    return True


def test_a_call_that_may_be_retried_is_made_again_in_the_new_host(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    model = make("retrying", max_restarts=-1, max_task_retries=-1)
    assert get(model.crash_once.remote(str(tmp_path / "flag"))) == "the second time"


def test_a_host_that_dies_while_nobody_calls_is_noticed(
    make: Callable[..., Any], cluster: PrivateDaemon, hosts: Any
) -> None:
    model = make("idle", max_restarts=1)
    os.kill(hosts("idle")["pid"], signal.SIGKILL)
    wait_until(lambda: _answers(model), within_s=20, what="the actor is restarted")


def test_a_host_that_dies_while_frozen_ends_its_actor_too(
    make: Callable[..., Any], cluster: PrivateDaemon, hosts: Any
) -> None:
    model = make("parked", 8 * MIB, max_restarts=1)
    get(freeze(model))
    queued = model.add.remote(5)
    os.kill(hosts("parked")["pid"], signal.SIGKILL)
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        get(queued)
    wait_until(lambda: _answers(model), within_s=20, what="the actor is restarted")
    assert states(model) == ["active"], "a new host, which nobody has frozen"
    assert get(model.history.remote()) == []


# -- the proxy ------------------------------------------------------------------------------------


def test_a_restarted_proxy_finds_its_host_with_its_state(
    make: Callable[..., Any], hosts: Any
) -> None:
    model = make("reattached", 8 * MIB, max_restarts=1)
    get(model.add.remote(5))
    host = hosts("reattached")["pid"]
    kill_proxy(model)
    wait_until(lambda: _answers(model), within_s=20, what="the proxy is restarted")
    assert get(model.add.remote(1)) == 6
    assert get(model.contents.remote()) == b"first bytes"
    assert hosts("reattached")["pid"] == host


def test_so_it_does_while_the_model_is_frozen_and_ray_makes_queued_calls_again(
    make: Callable[..., Any], hosts: Any
) -> None:
    model = make("refrozen", 8 * MIB, max_restarts=1, max_task_retries=-1)
    get(model.add.remote(5))
    get(freeze(model))
    host = hosts("refrozen")["pid"]
    queued = [model.add.remote(i) for i in range(3)]
    kill_proxy(model)
    wait_until(
        lambda: get(status(model))["calls"]["gate"] == "frozen", within_s=20, what="it is back"
    )
    assert ray.wait(queued, timeout=0.3)[0] == []
    get(thaw(model))
    assert max(get(queued)) == 8
    # Ray's retries need not keep the order; but none is lost, and none is executed twice.
    assert sorted(get(model.history.remote())) == [0, 1, 2, 5]
    assert get(model.contents.remote()) == b"first bytes"
    assert hosts("refrozen")["pid"] == host


def test_the_host_of_a_proxy_that_is_not_restarted_ends(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    model = make("final")
    get(freeze(model))
    queued = model.add.remote()
    kill_proxy(model)
    await_no_hosts(cluster, "final", within_s=GONE_S)
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(queued)


# -- the actor ------------------------------------------------------------------------------------


def test_ray_kill_ends_a_frozen_model_too(make: Callable[..., Any], cluster: PrivateDaemon) -> None:
    model = make("killed", 8 * MIB, max_restarts=-1)
    get(freeze(model))
    queued = model.add.remote()
    ray.kill(model)
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(queued)
    await_no_hosts(cluster, "killed", within_s=GONE_S)


def test_a_model_ends_with_its_last_handle(cluster: PrivateDaemon) -> None:
    from ray_integration import freezable
    from ray_models import Model

    model = freezable(Model).remote()
    get(model.add.remote())
    get(freeze(model))
    assert [name for name in names(cluster) if name.startswith("Model")]
    del model
    await_no_hosts(cluster, "Model", within_s=GONE_S)


DRIVER = """
import os, signal, sys, ray
sys.path.insert(0, {tests!r})
ray.init(address={address!r}, log_to_driver=False, logging_level=40, namespace="another", **{options!r})
from ray_integration import freezable, freeze
from ray_models import Model
stays = freezable(Model).options(name="stays", lifetime="detached").remote() if {detached!r} else None
goes = freezable(Model).options(name="goes").remote()
ray.get([goes.add.remote(), *([stays.add.remote(7)] if stays else [])])
ray.get(freeze([goes, *([stays] if stays else [])]))
if {kill!r}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_driver(**values: Any) -> None:
    program = DRIVER.format(tests=str(ROOT / "tests"), **values)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == (-signal.SIGKILL if values["kill"] else 0), ended.stderr


@pytest.mark.parametrize("kill", [False, True], ids=["exits", "is killed"])
def test_a_drivers_models_end_with_it_but_for_detached_ones(
    kill: bool, cluster: PrivateDaemon
) -> None:
    address = ray.get_runtime_context().gcs_address
    run_driver(address=address, options={}, detached=not kill, kill=kill)
    await_no_hosts(cluster, "goes", within_s=GONE_S)
    if not kill:
        _goes_on(cluster)


def _goes_on(cluster: PrivateDaemon) -> None:
    stays: Any = ray.get_actor("stays", namespace="another")
    assert states(stays) == ["frozen"]
    get(thaw(stays))
    assert get(stays.add.remote(1)) == 8
    ray.kill(stays)
    await_no_hosts(cluster, "stays", within_s=GONE_S)


SWAPPING = """
import ray
ray.init(address={address!r}, log_to_driver=False, logging_level=40, namespace={namespace!r})
from ray_integration import swap
ray.get(swap("on", "off"))
"""


def test_a_swap_goes_on_without_the_driver_that_asked_for_it(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    off, on = make("off", LARGE, start_frozen=True), make("on", LARGE)
    script = Script(cluster.sim_dir)
    script.add("checkpoint", when="middle", delay_s=2.5)
    context = ray.get_runtime_context()
    program = SWAPPING.format(address=context.gcs_address, namespace=context.namespace)
    driver = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(lambda: script.fired("checkpoint"), within_s=40, what="the freeze has begun")
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait()
    assert states(off, on) == ["frozen", "freezing"], "in its middle"
    wait_until(
        lambda: states(off, on) == ["active", "frozen"], within_s=20, what="the swap is done"
    )
    assert get(off.contents.remote()) == b"first bytes"
    script.clear()


HOLDING = """
import time, ray
ray.init(address={address!r}, log_to_driver=False, logging_level=40, namespace={namespace!r})
from ray_integration import on_gpu
with on_gpu("held"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow  # another driver
def test_a_lease_ends_with_the_driver_that_holds_it(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    model = make("held", 8 * MIB)
    context = ray.get_runtime_context()
    program = HOLDING.format(address=context.gcs_address, namespace=context.namespace)
    driver = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    with driver:
        try:
            assert driver.stdout is not None and driver.stdout.readline() == b"held\n"
            with pytest.raises(LeaseHeld):
                get(freeze(model))
        finally:
            driver.kill()
    wait_until(lambda: _can_be_frozen(model), within_s=GONE_S, what="the lease has ended")


def _can_be_frozen(model: Any) -> bool:
    try:
        return bool(get(freeze(model))["tier"] == "ram")
    except LeaseHeld:
        return False


def test_a_swap_goes_on_without_the_agent_that_performs_it(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    off, on = make("off", LARGE, start_frozen=True), make("on", LARGE)
    script = Script(cluster.sim_dir)
    script.add("checkpoint", when="middle", delay_s=1.0)
    ref = swap(on, off)
    wait_until(lambda: script.fired("checkpoint"), within_s=20, what="the freeze has begun")
    node_id = ray.get_runtime_context().get_node_id()
    ray.kill(agent.handle(node_id), no_restart=False)
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        get(ref)
    # Another agent, as soon as it is there: what was asked is a success, done by now or not, and calls go on.
    wait_until(lambda: _is_there(swap(on, off)), within_s=20, what="another agent answers")
    assert states(off, on) == ["active", "frozen"]
    assert get(off.contents.remote()) == b"first bytes"
    script.clear()


def _is_there(ref: Any) -> bool:
    try:
        return bool(get(ref))
    except ray.exceptions.ActorUnavailableError:
        return False


@pytest.mark.slow  # a Ray of its own
def test_the_hosts_of_a_cluster_that_is_gone_end_without_ray(cluster: PrivateDaemon) -> None:
    """Nobody is left who could ask Ray: the keeper acts."""
    options = {"num_cpus": 2, "include_dashboard": False}
    run_driver(address="local", options=options, detached=False, kill=True)
    await_no_hosts(cluster, "goes", within_s=GONE_S)


# -- the daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["checkpoint", "restore"])
def test_a_swap_survives_the_daemon_that_began_it(
    call: str, make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    off, on = make("off", LARGE, start_frozen=True), make("on", LARGE)
    script = Script(cluster.sim_dir)
    script.add(call, when="middle", delay_s=0.5)
    ref = swap(on, off)
    wait_until(lambda: script.fired(call), within_s=20, what=f"the {call} has begun")
    cluster.kill9()
    waiting = off.contents.remote()
    cluster.start()
    get(ref, timeout=60)
    assert states(off, on) == ["active", "frozen"]
    assert get(waiting) == b"first bytes"
    get(swap(off, on))
    assert get(on.contents.remote()) == b"first bytes"
    script.clear()


def test_without_a_daemon_calls_go_on_and_moves_say_so(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    model = make("alone", 8 * MIB)
    cluster.kill9()
    begun = time.monotonic()
    assert get(model.add.remote(3)) == 3
    assert time.monotonic() - begun < 5
    ref = freeze(model)
    assert ray.wait([ref], timeout=1.0)[0] == [], "the daemon may come back"
    cluster.start()
    assert get(ref)["tier"] == "ram"
    get(thaw(model))


def test_a_daemon_that_does_not_come_back_is_named(tmp_path: Path) -> None:
    client = GpuSched(str(tmp_path / "no-daemon"))
    begun = time.monotonic()
    with pytest.raises(DaemonUnavailable, match="no-daemon"):
        exchange.insist(client.processes, timeout_s=0.5)
    assert 0.5 <= time.monotonic() - begun < 5
