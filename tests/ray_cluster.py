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


@pytest.fixture(scope="session")
def ray_daemon() -> Iterator[PrivateDaemon]:
    """The daemon of the shared cluster. Its end proves that no host and no keeper is left but by its hand."""
    daemon = PrivateDaemon(gpus=GPUS, vram="512M")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.end()


@pytest.fixture(scope="session")
def cluster(ray_daemon: PrivateDaemon) -> Iterator[PrivateDaemon]:
    """Ray on this machine, with the daemon's GPUs, token authentication on (its default for a local cluster)."""
    import ray

    variables = {
        "GPUSCHED_SOCKET": ray_daemon.socket,
        "GPUSCHED_RAY_DIR": str(ray_daemon.directory / "ray"),
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "NCCL_NVLS_ENABLE": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        ray.init(
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
        wait_until(
            lambda: not [n for n in names(ray_daemon) if not n.startswith("ray-keeper")],
            within_s=15,
            what="the keeper has ended every host of the cluster",
        )


def names(daemon: PrivateDaemon) -> list[str]:
    return [process["name"] for process in daemon.client().processes()]


@pytest.fixture
def hosts(cluster: PrivateDaemon) -> Callable[[str], Any]:
    """A function that gives the daemon's entry of the only host whose name begins so."""

    def host(prefix: str) -> Any:
        (found,) = [p for p in cluster.client().processes() if p["name"].startswith(f"{prefix}-")]
        return found

    return host
