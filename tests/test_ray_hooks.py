"""What a model does around its own freeze, and the ranks of a group doing it together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from daemons import PrivateDaemon
from ray_cluster import await_no_hosts, get, states
from ray_integration import DrainTimeout, HookFailed, freezable, freeze, group, thaw
from ray_models import Rank

pytestmark = pytest.mark.ray
BOTH = ["before_freeze on MainThread", "after_thaw on MainThread"]


@pytest.fixture
def ranks(cluster: PrivateDaemon, tmp_path: Path) -> Iterator[list[Any]]:
    """Two ranks, one on each GPU, as the group "ranks"."""
    made = [freezable(gpus=[n])(Rank) for n in range(2)]
    handles = [cls.remote(rank, str(tmp_path)) for rank, cls in enumerate(made)]
    get([handle.__ray_ready__.remote() for handle in handles])
    group("ranks", handles)
    yield handles
    for handle in handles:
        ray.kill(handle)
    await_no_hosts(cluster)


def test_the_ranks_of_a_group_meet_before_the_freeze_and_after_the_thaw(ranks: list[Any]) -> None:
    assert [each["tier"] for each in get(freeze("ranks"))] == ["ram", "ram"]
    waiting = [rank.history.remote() for rank in ranks]
    assert ray.wait(waiting, timeout=0.3)[0] == []
    get(thaw("ranks"))
    assert get(waiting) == [BOTH, BOTH], "the calls ran after the hooks"
    get(freeze("ranks"))
    get(freeze("ranks"))  # frozen already: nothing is called twice
    get(thaw("ranks"))
    assert get([rank.history.remote() for rank in ranks]) == [BOTH * 2, BOTH * 2]


def test_a_hook_that_fails_stops_the_freeze_of_all(ranks: list[Any]) -> None:
    get([rank.fail.remote("before_freeze") for rank in ranks])
    with pytest.raises(HookFailed, match=r"before_freeze failed: .*is told to fail"):
        get(freeze("ranks"))
    assert states(*ranks) == ["active", "active"]
    assert get([rank.history.remote() for rank in ranks]) == [[], []]


def test_a_rank_that_is_still_called_stops_the_freeze_before_any_hook(ranks: list[Any]) -> None:
    busy = ranks[1].slow.remote(1.5)
    begun = time.monotonic()
    with pytest.raises(DrainTimeout):
        get(freeze("ranks", timeout_s=0.3))
    assert time.monotonic() - begun < 1.4, "nobody's hook has waited for the other's"
    assert states(*ranks) == ["active", "active"]
    get(busy)
    assert get([rank.history.remote() for rank in ranks]) == [[], []]


def test_a_hook_that_fails_after_the_thaw_is_told_and_calls_go_on(ranks: list[Any]) -> None:
    get([rank.fail.remote("after_thaw") for rank in ranks])
    get(freeze("ranks"))
    with pytest.raises(HookFailed, match="after_thaw failed"):
        get(thaw("ranks"))
    assert states(*ranks) == ["active", "active"]
    assert get([rank.history.remote() for rank in ranks]) == [BOTH[:1], BOTH[:1]]
