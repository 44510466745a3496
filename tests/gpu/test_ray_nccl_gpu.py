"""Ranks that talk by NCCL, peer to peer: hosted ones with hooks are frozen, attached ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray_on_gpu import ray_with_daemon

from ray_cluster import NO_MULTICAST
from ray_integration.torch_groups import TorchDistributedHooks

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.ray, pytest.mark.timeout(600)]
TIMEOUT_S = 180.0
NUMBERS = 64 << 20  # 256 MiB of floats
RANKS = 2


class Talks:
    """All-reduces numbers that say which rank they came from."""

    rank: int

    def begin(self, rank: int) -> None:
        import torch

        self.rank = rank
        torch.cuda.set_device(0)
        self.weights = torch.full((NUMBERS,), float(rank + 1), device="cuda")

    def total(self, group: Any = None) -> tuple[float, float]:
        """The least and the greatest of the sums: both are 3."""
        import torch.distributed as dist

        summed = self.weights.clone()
        dist.all_reduce(summed, group=group)
        return float(summed.min()), float(summed.max())


class Rank(TorchDistributedHooks, Talks):
    def __init__(self, rank: int, init_method: str) -> None:
        self.begin(rank)
        self.join("nccl", init_method=init_method, rank=rank, ranks=RANKS)
        self.add_group("both", list(range(RANKS)))

    def talk(self) -> list[tuple[float, float]]:
        return [self.total(), self.total(self.groups["both"])]

    def environment(self) -> dict[str, str | None]:
        import os

        return {name: os.environ.get(name) for name in (*NO_MULTICAST, "NCCL_P2P_DISABLE")}


class PlainRank(Talks):
    """An actor that is not ours: without hooks."""

    def __init__(self, rank: int, init_method: str) -> None:
        import torch.distributed as dist

        self.begin(rank)
        dist.init_process_group("nccl", init_method=init_method, rank=rank, world_size=RANKS)

    def talk(self) -> list[tuple[float, float]]:
        return [self.total()]

    def leave(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


def test_two_nccl_ranks_are_frozen_as_one_group_and_talk_again(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from ray_cluster import get
    from ray_integration import freezable, freeze, group, thaw

    with ray_with_daemon() as daemon, daemon.client() as client:
        idle = [gpu["mem_used_mb"] for gpu in client.status()["gpus"]]
        where = f"file://{tmp_path}/ranks"
        made = [freezable(gpus=[n], isolate=False)(Rank).remote(n, where) for n in range(RANKS)]
        get([each.__ray_ready__.remote() for each in made], timeout=TIMEOUT_S)
        wanted = {**NO_MULTICAST, "NCCL_P2P_DISABLE": None}
        assert get([each.environment.remote() for each in made]) == [wanted] * RANKS
        group("ranks", made)
        right = [[(3.0, 3.0)] * 2] * RANKS
        assert get([each.talk.remote() for each in made], timeout=TIMEOUT_S) == right
        for number in range(10):
            frozen = get(freeze("ranks"), timeout=TIMEOUT_S)
            assert [each["tier"] for each in frozen] == ["ram"] * RANKS
            used = [gpu["mem_used_mb"] for gpu in client.status()["gpus"]]
            left = [now - before for now, before in zip(used, idle, strict=True)]
            assert max(left[:RANKS]) < 64
            get(thaw("ranks"), timeout=TIMEOUT_S)
            talked = get([each.talk.remote() for each in made], timeout=TIMEOUT_S)
            assert talked == right, f"round {number}"


def test_attached_ranks_are_refused_until_they_have_left_their_group(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import ray

    from gpusched.errors import Unsupported
    from ray_cluster import get, states
    from ray_integration import attach, freeze, thaw

    with ray_with_daemon(gpus=RANKS):
        plain: Any = ray.remote(num_gpus=1)(PlainRank)
        made = [plain.remote(n, f"file://{tmp_path}/plain") for n in range(RANKS)]
        right = [[(3.0, 3.0)]] * RANKS
        assert get([each.talk.remote() for each in made], timeout=TIMEOUT_S) == right
        get(attach(made))
        with pytest.raises(Unsupported, match="NCCL"):
            get(freeze(made), timeout=TIMEOUT_S)
        assert states(*made) == ["active"] * RANKS
        assert get([each.talk.remote() for each in made], timeout=TIMEOUT_S) == right
        get([each.leave.remote() for each in made], timeout=TIMEOUT_S)
        get(freeze(made), timeout=TIMEOUT_S)
        get(thaw(made), timeout=TIMEOUT_S)
        assert states(*made) == ["active"] * RANKS
