"""A freezable class is called as a plain Ray actor is, and what it does is done in the host."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from daemons import PrivateDaemon
from ray_cluster import NO_MULTICAST, get
from ray_integration import HostError, freezable
from ray_models import AsyncModel, Model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def model(cluster: PrivateDaemon) -> Any:
    return freezable(Model).options(num_gpus=0.1, name="calls").remote(start=5)


def test_a_call_gives_a_reference_and_state_stays_in_the_host(model: Any) -> None:
    ref = model.add.remote(2)
    assert isinstance(ref, ray.ObjectRef)
    first = get(ref)
    assert get(model.add.remote(amount=3)) == first + 3


def test_the_host_is_the_workers_twin_outside_of_ray(model: Any, hosts: Any) -> None:
    found = get(model.where.remote())
    entry = hosts("calls")
    assert (entry["state"], entry["uid"], found["uid"]) == ("active", os.getuid(), os.getuid())
    assert found["made_on"] == found["called_on"] == "MainThread"
    assert not found["is_ray_initialised"]
    # The other one Ray itself sets where it is imported.
    assert set(found["ray_variables"]) == {"RAY_CLIENT_MODE", "RAY_ENABLE_AUTO_CONNECT"}
    assert found["cuda"].startswith("GPU-sim")
    assert found["executable"] == sys.executable
    assert NO_MULTICAST.items() <= found["environment"].items()
    worker = get(ray.remote(lambda: (Path.cwd(), list(sys.path))).remote())
    assert Path(found["cwd"]) == worker[0]
    assert [p for p in worker[1] if p not in found["path"]] == []


def test_the_host_has_what_the_runtime_environment_gives_its_worker(cluster: PrivateDaemon) -> None:
    given = {"env_vars": {"OF_THE_RUNTIME": "yes"}}
    of_host = freezable(env={"OF_THE_HOST": "yes"})(Model)
    handle = of_host.options(runtime_env=given, num_gpus=0.1).remote()
    found = get(handle.where.remote())["environment"]
    assert (found["OF_THE_RUNTIME"], found["OF_THE_HOST"]) == ("yes", "yes")


def test_ray_is_not_begun_by_a_model_that_uses_it(model: Any) -> None:
    def use(self: Any) -> tuple[str, bool]:
        try:
            ray.get(ray.put(1))
        except Exception as error:  # noqa: BLE001 - Ray's own, of whatever class
            return str(error), ray.is_initialized()
        return "it worked", True

    said, is_initialised = get(model.__ray_call__.remote(use))
    assert "ray.init" in said.lower() or "not initialized" in said.lower(), said
    assert not is_initialised


def test_a_call_asks_the_daemon_nothing(model: Any, cluster: PrivateDaemon) -> None:
    calls, client = 300, cluster.client()
    get(model.double.remote(1))
    before = client.status()["metrics"]["requests"]
    get([model.double.remote(n) for n in range(calls)])
    # The agent looks at its node's models by the clock.
    assert client.status()["metrics"]["requests"] - before < calls / 10


def test_arguments_are_checked_where_the_call_is_made(model: Any) -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'amount'"):
        model.slow_add.remote(seconds=1.0)
    with pytest.raises(TypeError):
        freezable(Model).remote(1, 2, 3, 4)


def test_options_of_a_method_and_of_a_call(model: Any) -> None:
    one, two = model.pair.remote()
    assert get([one, two]) == [1, 2]
    both = model.pair.options(num_returns=1).remote()
    assert get(both) == (1, 2)
    assert get(model.double.remote(21)) == 42


def test_references_as_arguments_are_resolved(model: Any) -> None:
    assert get(model.total.remote(ray.put(np.ones(10)))) == 10
    assert get(model.echo.remote({"a": [1, None]})) == {"a": [1, None]}


def test_handles_are_passed_on_and_found_by_name(model: Any) -> None:
    @ray.remote(num_cpus=0)
    def ask(handle: Any) -> Any:
        return ray.get(handle.double.remote(4))

    assert get(ask.remote(model)) == 8
    assert get(ray.get_actor("calls").double.remote(5)) == 10


def test_an_exception_is_its_own_and_shows_the_hosts_frames(model: Any) -> None:
    with pytest.raises(KeyError) as caught:
        get(model.fail.remote("a key"))
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    text = str(caught.value)
    assert "ray_models.py" in text and "in _deeper" in text and "raise KeyError(key)" in text
    with pytest.raises(HostError, match="OddError: odd 1 2") as odd:
        get(model.fail_oddly.remote())
    assert "in fail_oddly" in str(odd.value)


def test_an_exception_in_the_constructor_ends_the_actor_and_leaves_no_host(
    cluster: PrivateDaemon,
) -> None:
    handle = freezable(Model).options(name="unborn", num_gpus=0.1).remote("not a number", -5.5)
    with pytest.raises(ray.exceptions.ActorDiedError, match=r"cannot allocate -5\.5 bytes"):
        get(handle.add.remote())
    names = [p["name"] for p in cluster.client().processes()]
    assert not [name for name in names if name.startswith("unborn")]


def test_a_generator_streams_and_computes_no_more_than_is_asked_for(model: Any) -> None:
    stream = model.items.remote(5)
    assert [get(ref) for ref in stream] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        get(model.fail.remote("the lane still works"))


def test_a_running_call_learns_that_it_was_cancelled(model: Any) -> None:
    ref = model.until_cancelled.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        get(ref, timeout=0.5)
    ray.cancel(ref)
    with contextlib.suppress(ray.exceptions.TaskCancelledError):  # which Ray may say in its place
        assert get(ref, timeout=10) == "cancelled"
    assert get(model.double.remote(1), timeout=10) == 2


def test_the_rays_own_call_runs_in_the_host(model: Any) -> None:
    assert get(model.__ray_ready__.remote())
    found = get(model.__ray_call__.remote(lambda self, x: (type(self).__name__, os.getpid(), x), 3))
    assert found == ("Model", get(model.where.remote())["pid"], 3)


def test_what_a_model_keeps_of_its_arguments_is_not_overwritten(model: Any) -> None:
    size = 1 << 17
    get(model.keep.remote(ray.put(np.full(size, 1.0))))
    for value in (2.0, 3.0):
        assert get(model.total.remote(ray.put(np.full(size, value)))) == value * size
    assert get(model.kept_total.remote()) == size


def test_large_results_are_right_and_stay_right(model: Any) -> None:
    first = get(model.ones.remote(1 << 18))
    second = get(model.echo.remote(np.full(1 << 18, 2.0)))
    assert first.sum() == 1 << 18 and second.sum() == 2 << 18


def test_classes_and_functions_of_the_drivers_script_travel(model: Any) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("class Point:\n    def __init__(self, x):\n        self.x = x\n", namespace)
    point = namespace["Point"](4)
    back = get(model.echo.remote(point))
    assert back.x == 4
    assert get(model.echo.remote(lambda x: x + 1))(1) == 2


def test_threads_run_at_the_same_time(cluster: PrivateDaemon) -> None:
    handle = freezable(Model).options(max_concurrency=4, num_gpus=0.1).remote()
    get(handle.add.remote())
    begun = time.monotonic()
    get([handle.slow_add.remote(1, 0.5) for _ in range(4)])
    assert time.monotonic() - begun < 1.5


def test_a_class_with_async_methods(cluster: PrivateDaemon) -> None:
    model = freezable(AsyncModel).options(num_gpus=0.1).remote()
    assert get(model.plain.remote()) == (0, "MainThread")
    begun = time.monotonic()
    assert get([model.wait.remote(0.5) for _ in range(20)]) == [0.5] * 20
    assert time.monotonic() - begun < 3
    assert [get(ref) for ref in model.numbers.remote(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="async"):
        get(model.fail.remote())
    endless = model.wait.remote(1000)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        get(endless, timeout=0.5)
    ray.cancel(endless)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(endless, timeout=10)
    assert get(model.plain.remote())[0] == 1


def test_a_decorated_class_with_options_of_ray(cluster: PrivateDaemon) -> None:
    @freezable(num_gpus=0.1, concurrency_groups={"side": 1})
    class Local:
        def main(self) -> str:
            import threading

            return threading.current_thread().name

        @ray.method(concurrency_group="side")
        def aside(self) -> str:
            import threading

            return threading.current_thread().name

    handle = Local.remote()  # type: ignore[attr-defined]
    assert get(handle.aside.remote()) != "MainThread"
    assert get(handle.main.remote()) == "MainThread"


def test_what_is_no_ordinary_class_is_refused() -> None:
    with pytest.raises(TypeError, match="ordinary class"):
        freezable(ray.remote(Model))
    with pytest.raises(ValueError, match="'queue', 'thaw' or 'raise'"):
        freezable(on_frozen="wait")


@pytest.mark.slow  # Ray tries for a long time
def test_all_this_is_with_token_authentication_on(cluster: PrivateDaemon) -> None:
    """Which is Ray's default for a local cluster: without the token nobody gets in."""
    address = ray.get_runtime_context().gcs_address
    ended = subprocess.run(
        [sys.executable, "-c", f"import ray; ray.init(address={address!r})"],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert "InvalidAuthToken" in ended.stderr
