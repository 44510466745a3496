"""One daemon and one Ray cluster for all tests of the integration that do not break them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import PrivateDaemon, wait_until

HERE = Path(__file__).resolve().parent
#: Of the one simulated node.
GPUS = 2
#: What operators set against NVLink multicast.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@pytest.fixture(scope="session")
def ray_daemon() -> Iterator[PrivateDaemon]:
    """The daemon of the shared cluster. Its end proves that no host and no keeper is left but by its hand."""
    daemon = PrivateDaemon(gpus=GPUS, vram="128M")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.end()


@pytest.fixture(scope="session")
def cluster(ray_daemon: PrivateDaemon) -> Iterator[PrivateDaemon]:
    """Ray on this machine, with the daemon's GPUs, token authentication on (also its default for a local cluster)."""
    import ray

    variables = {
        "GPUSCHED_SOCKET": ray_daemon.socket,
        "GPUSCHED_RAY_DIR": str(ray_daemon.directory / "ray"),
        "RAY_metrics_report_interval_ms": "1000",  # of a test that waits for them
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        **NO_MULTICAST,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        ray.init(
            address="local",
            num_cpus=8,
            num_gpus=GPUS,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 * 2**20,
            logging_level=logging.ERROR,
        )
        yield ray_daemon
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        await_no_hosts(ray_daemon, within_s=15)  # the keeper's doing


def names(daemon: PrivateDaemon) -> list[str]:
    return [process["name"] for process in daemon.client().processes()]


def get(ref: Any, timeout: float = 30.0) -> Any:
    import ray

    return ray.get(ref, timeout=timeout)


def states(*handles: Any) -> list[str]:
    """What the daemon says of each model's host."""
    from ray_integration import status

    return [each["state"] for each in get(status(list(handles)))]


@pytest.fixture
def make(cluster: PrivateDaemon) -> Iterator[Callable[..., Any]]:
    """Makes models on GPU 0; they are killed afterwards, and their hosts are gone soon after."""
    import ray

    from ray_integration import freezable
    from ray_models import Model

    made: list[Any] = []

    def model(name: str, vram: int = 0, cls: type = Model, **options: Any) -> Any:
        actor = freezable(gpus=[0], **options)(cls)
        handle = actor.options(name=name).remote(**({"vram_bytes": vram} if vram else {}))
        made.append(handle)
        get(handle.__ray_ready__.remote())
        return handle

    yield model
    for handle in made:
        ray.kill(handle)
    made.clear()
    await_no_hosts(cluster)


def await_no_hosts(daemon: PrivateDaemon, *prefixes: str, within_s: float = 10.0) -> None:
    """Waits until no host (of such a name) is left; the keeper is none."""

    def left() -> list[str]:
        found = [name for name in names(daemon) if not name.startswith("ray-keeper")]
        return [name for name in found if name.startswith(prefixes or "")]

    wait_until(lambda: not left(), within_s=within_s, what="every host of a dead actor is gone")


@pytest.fixture
def hosts(cluster: PrivateDaemon) -> Callable[[str], Any]:
    """A function that gives the daemon's entry of the only host whose name begins so."""

    def host(prefix: str) -> Any:
        (found,) = [p for p in cluster.client().processes() if p["name"].startswith(f"{prefix}-")]
        return found

    return host
