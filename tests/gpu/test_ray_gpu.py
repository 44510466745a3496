"""Models of Ray on a real GPU: hosted ones swapped 200 times, and attached actors. Needs ray and PyTorch."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from ray_on_gpu import ray_with_daemon

pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.timeout(600)]
#: Of a model's weights. Small, so that 200 swaps take less than two minutes by the driver's own copy too.
SIZE = 256 << 20
TIMEOUT_S = 180.0


class TorchModel:
    """Some VRAM that was made from a seed."""

    def __init__(self, seed: int, size: int) -> None:
        import torch

        generator = torch.Generator(device="cuda").manual_seed(seed)
        self.weights = torch.randint(
            0, 2**31, (size // 4,), dtype=torch.int32, device="cuda", generator=generator
        )

    def digest(self) -> int:
        return int(self.weights.sum().item())

    def touch_nothing(self) -> int:
        return os.getpid()


def test_two_hundred_swaps_of_hosted_pytorch_models() -> None:
    pytest.importorskip("torch")
    import ray_swaps
    from ray_cluster import get
    from ray_integration import freezable

    size = int(os.environ.get("GPUSCHED_SWAP_MIB", SIZE >> 20)) << 20
    args = os.environ.get("GPUSCHED_DAEMON_ARGS", "").split()
    with ray_with_daemon(args=args) as daemon:
        first = freezable(start_frozen=True)(TorchModel).remote(1, size)
        get(first.__ray_ready__.remote(), timeout=TIMEOUT_S)
        second = freezable(TorchModel).remote(2, size)
        get(second.__ray_ready__.remote(), timeout=TIMEOUT_S)
        models: dict[str, Any] = {"first": first, "second": second}
        with daemon.client() as client:
            seen = ray_swaps.swaps(models, client, 100)
        print(json.dumps(seen, indent=1))
        slack = {"KiB": 65536, "descriptors": 2, "MiB": 32}
        assert ray_swaps.grown(seen, slack=slack) == {}, seen


@pytest.mark.parametrize("path", ["driver", "direct"])
def test_an_attached_pytorch_actor_gives_its_gpu_back_and_is_never_stopped(path: str) -> None:
    pytest.importorskip("torch")
    import ray

    from gpusched import preload_env
    from ray_cluster import get
    from ray_integration import attach, freeze, status, thaw

    options: dict[str, Any] = (
        {"runtime_env": {"env_vars": preload_env()}} if path == "direct" else {}
    )
    with ray_with_daemon(gpus=1) as daemon, daemon.client() as client:
        idle = client.status()["gpus"][0]["mem_used_mb"]
        worker: Any = ray.remote(num_gpus=1, **options)(TorchModel).remote(3, 2 << 30)
        right = get(worker.digest.remote(), timeout=TIMEOUT_S)
        used = client.status()["gpus"][0]["mem_used_mb"]  # as NVML says
        assert used - idle > 2048
        found = get(attach(worker))
        assert (found["stop"], found["gpus"]) == (False, [0])
        for _ in range(3):
            frozen = get(freeze(worker), timeout=TIMEOUT_S)
            assert frozen["mem_mb"] >= 2048
            assert frozen["path"] == path
            assert client.status()["gpus"][0]["mem_used_mb"] - idle < 64
            assert get(worker.touch_nothing.remote()) == found["pid"]
            waiting = worker.digest.remote()
            assert not ray.wait([waiting], timeout=1.0)[0], "CUDA waits for the thaw"
            assert get(status(worker))["state"] == "frozen"
            thawed = get(thaw(worker), timeout=TIMEOUT_S)
            assert get(waiting, timeout=TIMEOUT_S) == right
            print(f"freeze {frozen['duration_ms']} ms, thaw {thawed['duration_ms']} ms")
        ray.kill(worker)
