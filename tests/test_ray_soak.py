"""Many swaps of hosted models leave nothing behind: the count that is asked for on a GPU, on simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import ray_swaps
from daemons import PrivateDaemon

MIB = 2**20


@pytest.mark.ray
@pytest.mark.slow
def test_two_hundred_swaps_grow_nothing_and_lose_nothing(
    make: Callable[..., Any], cluster: PrivateDaemon
) -> None:
    large = 75 * MIB  # two do not fit
    models = {"first": make("first", large, start_frozen=True), "second": make("second", large)}
    seen = ray_swaps.swaps(models, cluster.client(), 100)
    slack = {"KiB": 8192, "descriptors": 2, "MiB": 0}
    assert ray_swaps.grown(seen, slack=slack) == {}, seen
