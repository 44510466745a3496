"""The order in which ``TorchDistributedHooks`` takes process groups down and makes them anew, and what stops it.

Against a stand-in for ``torch.distributed`` that records what it is asked: it shows what the hooks do, in which order
and after which errors, and proves nothing of NCCL; ``gpu/test_ray_nccl_gpu.py`` does, on two GPUs. With PyTorch
installed, also two processes over Gloo.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from daemons import ROOT
from ray_integration import torch_groups
from ray_integration.torch_groups import TorchDistributedHooks


class ProcessGroup:
    """Of some ranks; nobody but the hooks refers to it."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks


class StandIn:
    """What of ``torch`` the hooks use. ``fails``: what is raised by whom, once each."""

    class NetworkError(RuntimeError):
        """As ``torch.distributed.DistNetworkError``: the address is in use."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails: dict[str, list[Exception]] = {}
        self.has_cuda = True
        self.model: TorchDistributedHooks | None = None
        self.groups_at_the_end: list[dict[str, Any]] = []

    def record(self, name: str, value: Any = None) -> None:
        self.calls.append((name, value))
        if self.fails.get(name):
            raise self.fails[name].pop(0)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def init_process_group(self, **options: Any) -> None:
        self.record("init", options)

    def new_group(self, ranks: list[int], **options: Any) -> ProcessGroup:
        self.record("new_group", (ranks, options))
        return ProcessGroup(ranks)

    def destroy_process_group(self) -> None:
        assert self.model is not None
        self.groups_at_the_end.append(dict(self.model.groups))
        self.record("destroy")


@pytest.fixture
def dist(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    torch: Any = ModuleType("torch")
    torch.cuda = ModuleType("torch.cuda")
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: found.has_cuda
    torch.cuda.synchronize = lambda: found.record("synchronize")
    torch.distributed = ModuleType("torch.distributed")
    torch.distributed.DistNetworkError = StandIn.NetworkError
    torch.distributed.barrier = lambda: found.record("barrier")
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        setattr(torch.distributed, name, getattr(found, name))
    for module in (torch, torch.distributed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch_groups, "_RETRY_S", 0.001)
    return found


@pytest.fixture
def rank(dist: StandIn) -> TorchDistributedHooks:
    """Rank 1 of 4, in two groups beside the default one."""
    made = dist.model = TorchDistributedHooks()
    made.join("nccl", init_method="file:///tmp/policy", rank=1, ranks=4, timeout_s=7.0)
    made.add_group("tensor", [0, 1])
    made.add_group("data", (1, 3), backend="gloo")
    return made


def test_a_rank_joins_once_and_keeps_its_groups_by_name(
    dist: StandIn, rank: TorchDistributedHooks
) -> None:
    assert dist.calls == [
        (
            "init",
            {
                "backend": "nccl",
                "init_method": "file:///tmp/policy.1",
                "rank": 1,
                "world_size": 4,
                "timeout": timedelta(seconds=7),
            },
        ),
        ("new_group", ([0, 1], {})),
        ("new_group", ([1, 3], {"backend": "gloo"})),
    ]
    assert {name: group.ranks for name, group in rank.groups.items()} == {
        "tensor": [0, 1],
        "data": [1, 3],
    }


def test_before_a_freeze_all_meet_and_no_group_is_left(
    dist: StandIn, rank: TorchDistributedHooks
) -> None:
    groups = [weakref.ref(group) for group in rank.groups.values()]
    dist.calls.clear()
    rank.before_freeze()
    assert dist.names() == ["synchronize", "barrier", "destroy"]
    assert dist.groups_at_the_end == [{}], "nobody can take a dead group from there"
    assert [group() for group in groups] == [None, None]


def test_where_cuda_is_not_in_use_nothing_is_begun_with_it(
    dist: StandIn, rank: TorchDistributedHooks
) -> None:
    dist.has_cuda = False
    dist.calls.clear()
    rank.before_freeze()
    assert dist.names() == ["barrier", "destroy"]


def test_after_each_thaw_all_is_made_in_the_first_order_at_another_file(
    dist: StandIn, rank: TorchDistributedHooks
) -> None:
    first, before = list(dist.calls), dict(rank.groups)
    for number in (2, 3):
        rank.before_freeze()
        dist.calls.clear()
        rank.after_thaw()
        again = {**first[0][1], "init_method": f"file:///tmp/policy.{number}"}
        assert dist.calls == [("init", again), *first[1:]]
        assert list(rank.groups) == ["tensor", "data"]
        assert not set(map(id, rank.groups.values())) & set(map(id, before.values()))


def test_an_address_stays_what_it_is(dist: StandIn) -> None:
    rank = dist.model = TorchDistributedHooks()
    rank.join("nccl", init_method="tcp://127.0.0.1:2345", rank=0, ranks=2)
    rank.before_freeze()
    rank.after_thaw()
    asked = [options["init_method"] for name, options in dist.calls if name == "init"]
    assert asked == ["tcp://127.0.0.1:2345"] * 2


@pytest.mark.parametrize("who", ["synchronize", "barrier"])
def test_what_fails_before_the_end_leaves_all_groups_as_they_were(
    who: str, dist: StandIn, rank: TorchDistributedHooks
) -> None:
    before = dict(rank.groups)
    dist.fails[who] = [RuntimeError("rank 2 is gone")]
    with pytest.raises(RuntimeError, match="rank 2 is gone"):
        rank.before_freeze()
    assert "destroy" not in dist.names()
    assert rank.groups == before


def test_a_port_that_is_not_free_yet_is_waited_for(
    dist: StandIn, rank: TorchDistributedHooks
) -> None:
    rank.before_freeze()
    dist.calls.clear()
    dist.fails["init"] = [StandIn.NetworkError("in use"), StandIn.NetworkError("in use")]
    rank.after_thaw()
    assert dist.names() == ["init"] * 3 + ["new_group"] * 2
    assert len({str(options) for name, options in dist.calls if name == "init"}) == 1


def test_but_not_for_ever(dist: StandIn) -> None:
    rank = TorchDistributedHooks()
    dist.fails["init"] = [StandIn.NetworkError("in use")] * 10_000
    with pytest.raises(StandIn.NetworkError, match="in use"):
        rank.join("nccl", init_method="tcp://127.0.0.1:2345", rank=0, ranks=2, timeout_s=0.05)
    assert dist.fails["init"], "it gave up by the clock"


def test_another_error_is_told_at_once(dist: StandIn, rank: TorchDistributedHooks) -> None:
    rank.before_freeze()
    dist.calls.clear()
    dist.fails["init"] = [ValueError("no such backend")]
    with pytest.raises(ValueError, match="no such backend"):
        rank.after_thaw()
    assert dist.names() == ["init"]


def test_who_has_not_joined_has_nothing_to_leave(dist: StandIn) -> None:
    rank = TorchDistributedHooks()
    rank.before_freeze()
    rank.after_thaw()
    assert dist.calls == []


PROGRAM = """
import sys, torch, torch.distributed as dist
from ray_integration.torch_groups import TorchDistributedHooks
rank = TorchDistributedHooks()
number = int(sys.argv[1])
rank.join("gloo", init_method="file://" + sys.argv[2], rank=number, ranks=2)
rank.add_group("both", [0, 1])
for _ in range(3):
    for group in (None, rank.groups["both"]):
        summed = torch.tensor([number + 1.0])
        dist.all_reduce(summed, group=group)
        assert summed.item() == 3
    rank.before_freeze()
    assert not dist.is_initialized()
    rank.after_thaw()
print("all right")
"""


def test_two_processes_meet_again_over_gloo(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), str(tmp_path / "ranks")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [rank.communicate(timeout=90) for rank in ranks]
    assert [out for out, _ in ended] == ["all right\n"] * 2, ended
