"""Replicas of a hosted PyTorch model on a real GPU: running copies with its weights. Needs ray, PyTorch and CRIU."""

from __future__ import annotations

import os
import tempfile
import time

import pytest

from daemons import ROOT, PrivateDaemon

pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.criu, pytest.mark.timeout(600)]
SIZE = 1 << 30


class TorchModel:
    """A GiB that was made from a seed, and a step that changes it."""

    def __init__(self, seed: int, size: int) -> None:
        import torch

        generator = torch.Generator(device="cuda").manual_seed(seed)
        self.weights = torch.randint(
            0, 2**31, (size // 4,), dtype=torch.int32, device="cuda", generator=generator
        )

    def digest(self) -> int:
        return int(self.weights.sum().item())

    def step(self) -> int:
        self.weights.add_(1)
        return self.digest()


def test_replicas_of_a_pytorch_model_have_its_weights_and_go_their_own_ways() -> None:
    pytest.importorskip("torch")
    import ray

    from ray_cluster import get, states
    from ray_integration import fork, freezable, freeze, thaw

    daemon = PrivateDaemon(backend="cuda")
    daemon.start()
    with tempfile.TemporaryDirectory(prefix="gsr-", dir="/tmp") as directory:
        os.environ |= {"GPUSCHED_SOCKET": daemon.socket, "GPUSCHED_RAY_DIR": directory}
        path = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            model = freezable(TorchModel).remote(1, SIZE)
            digest = get(model.digest.remote(), timeout=180)
            began = time.monotonic()
            replicas = fork(model, copies=2, timeout_s=180)
            print(f"two replicas in {time.monotonic() - began:.1f} s")
            for handle in (model, *replicas):
                assert get(handle.digest.remote(), timeout=60) == digest
            stepped = get(replicas[0].step.remote(), timeout=60)
            assert stepped != digest
            get(freeze([model, replicas[0]]), timeout=60)
            assert states(model, *replicas) == ["frozen", "frozen", "active"]
            get(thaw([model, replicas[0]]), timeout=60)
            found = [get(handle.digest.remote(), timeout=60) for handle in (model, *replicas)]
            assert found == [digest, stepped, digest]
        finally:
            ray.shutdown()
            daemon.end()
