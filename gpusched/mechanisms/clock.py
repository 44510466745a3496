"""The system's clocks. Implements ``ports.Clock``."""

from __future__ import annotations

import time


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time_ns() / 1e9
