"""Two models that take turns on a real GPU: nothing grows, nothing is lost. About 80 s on an H100."""

from __future__ import annotations

import json

import pytest

import flatness
from daemons import PrivateDaemon

pytestmark = pytest.mark.gpu


def test_memory_descriptors_threads_and_vram_stay_flat_over_a_hundred_swaps() -> None:
    daemon = PrivateDaemon(backend="cuda")
    daemon.start()
    try:
        # Each cycle is two swaps. A context comes and goes with each: the driver's own use of VRAM is not the same to
        # the MiB. Calls take long here, so that more of them may meet than in the warm-up.
        seen = flatness.swaps(
            daemon, 50, vram="64M", warm_up=3, slack_kib=4096, noise_mib=32, calls=4
        )
        print(json.dumps(seen, indent=1))
    finally:
        daemon.end()
