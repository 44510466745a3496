"""Two models that take turns all day: nothing grows, nothing is lost. ``make soak`` does it a thousand times."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import flatness
from conftest import StartDaemon

CYCLES = 50
SOAK_CYCLES = 1000


def test_memory_descriptors_threads_and_vram_stay_flat_over_swaps(
    private_daemon: StartDaemon, soak: bool, record_property: Callable[[str, object], None]
) -> None:
    daemon = private_daemon(vram="24M")  # the two do not fit together
    seen = flatness.swaps(daemon, SOAK_CYCLES if soak else CYCLES, vram="16M")
    record_property("swaps", json.dumps(seen))  # scripts/soak_result.py keeps it
    print(json.dumps(seen, indent=1))


@pytest.mark.parametrize(
    ("what", "more", "is_flat"),
    [
        ("daemon: RSS, KiB", 2048, True),
        ("daemon: RSS, KiB", 2049, False),
        ("daemon: descriptors", 1, False),
        ("driver helper: threads", 1, False),
        ("VRAM in use, MiB", 1, False),
        ("snapshots, MiB", 1, False),
        ("files of state", 1, False),
        ("journal, KiB", 3 << 10, True),
        ("journal, KiB", 5 << 10, False),
        ("other files of state, KiB", 1, False),
    ],
)
def test_what_grows_is_named(what: str, more: int, is_flat: bool) -> None:
    before = {what: 100, "daemon: threads": 7}
    after = {what: 100 + more, "daemon: threads": 5}
    found = flatness.grown(before, after, slack_kib=2048, noise_mib=0)
    assert found == ({} if is_flat else {what: (100, 100 + more)})
