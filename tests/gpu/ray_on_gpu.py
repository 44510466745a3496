"""A daemon on real GPUs and a Ray beside it, for one test."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from daemons import ROOT, PrivateDaemon
from ray_cluster import NO_MULTICAST


@contextlib.contextmanager
def ray_with_daemon(gpus: int = 0, **daemon_options: Any) -> Iterator[PrivateDaemon]:
    """``gpus``: what Ray is told to have."""
    import ray

    path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    path.append(os.environ.get("PYTHONPATH", ""))
    before = dict(os.environ)
    daemon = PrivateDaemon(backend="cuda", **daemon_options)
    daemon.start()
    with tempfile.TemporaryDirectory(prefix="gsr-", dir="/tmp") as directory:
        os.environ |= {
            "GPUSCHED_SOCKET": daemon.socket,
            "GPUSCHED_RAY_DIR": directory,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            **NO_MULTICAST,
        }
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 * 2**20,
        )
        try:
            yield daemon
        finally:
            ray.shutdown()
            daemon.end()
            os.environ.clear()
            os.environ |= before
