"""Hosted PyTorch models on a real GPU: swapped 200 times, nothing grows, nothing is lost. Needs ray and PyTorch."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import pytest

from daemons import ROOT, PrivateDaemon

pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.timeout(1800)]
SIZE = 2 << 30


class TorchModel:
    """Some GiB that were made from a seed."""

    def __init__(self, seed: int, size: int) -> None:
        import torch

        generator = torch.Generator(device="cuda").manual_seed(seed)
        self.weights = torch.randint(
            0, 2**31, (size // 4,), dtype=torch.int32, device="cuda", generator=generator
        )

    def digest(self) -> int:
        return int(self.weights.sum().item())


def test_two_hundred_swaps_of_hosted_pytorch_models() -> None:
    pytest.importorskip("torch")
    import ray

    import ray_swaps
    from ray_cluster import get
    from ray_integration import freezable

    daemon = PrivateDaemon(backend="cuda")
    daemon.start()
    with tempfile.TemporaryDirectory(prefix="gsr-", dir="/tmp") as directory:
        os.environ |= {"GPUSCHED_SOCKET": daemon.socket, "GPUSCHED_RAY_DIR": directory}
        path = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            first = freezable(start_frozen=True)(TorchModel).remote(1, SIZE)
            get(first.__ray_ready__.remote(), timeout=180)
            second = freezable(TorchModel).remote(2, SIZE)
            get(second.__ray_ready__.remote(), timeout=180)
            models: dict[str, Any] = {"first": first, "second": second}
            with daemon.client() as client:
                seen = ray_swaps.swaps(models, client, 100)
            print(json.dumps(seen, indent=1))
            slack = {"KiB": 65536, "descriptors": 2, "MiB": 32}
            assert ray_swaps.grown(seen, slack=slack) == {}, seen
        finally:
            ray.shutdown()
            daemon.end()
