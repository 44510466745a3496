"""What the tests on a real GPU share: a daemon of the cuda backend, and chance that can be had again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from daemons import PrivateDaemon


@pytest.fixture
def daemon() -> Iterator[PrivateDaemon]:
    started = PrivateDaemon(backend="cuda")
    started.start()
    yield started
    started.end()


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("GPUSCHED_SEED", "0")) or random.SystemRandom().randrange(10**6)
    print(f"GPUSCHED_SEED={seed}")
    return random.Random(seed)
