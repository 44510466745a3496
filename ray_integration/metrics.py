"""What a node's agent tells Ray's metrics: shown by Ray's dashboard, and at the node's metrics port for Prometheus.

Base units; no actor's or operation's id as a label. The daemon's own figures are the truth for everything that is not
a model of Ray's.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ray.util.metrics import Counter, Gauge, Histogram

from gpusched import errors

_SECONDS: Final = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
_STATES: Final = ("active", "frozen", "hibernated")


class NodeMetrics:
    """The metrics of one agent; made once for each process."""

    def __init__(self) -> None:
        self._models = Gauge(
            "gpusched_models", "Models of this node by the state of their hosts.", ("state",)
        )
        self._bytes = Gauge(
            "gpusched_model_vram_bytes", "VRAM of this node's models, by where it is.", ("state",)
        )
        self._moves = Counter(
            "gpusched_moves_total", "Moves of models that were asked for.", ("op", "outcome")
        )
        self._seconds = Histogram(
            "gpusched_move_duration_seconds", "From the request to its end.", _SECONDS, ("op",)
        )

    @contextlib.contextmanager
    def move(self, op: str) -> Iterator[None]:
        """Counts one move, how it ended and how long it took, draining included."""
        begun = time.monotonic()
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except errors.GpuschedError as error:
            outcome = error.code
            raise
        finally:
            self._moves.inc(1.0, {"op": op, "outcome": outcome})
            self._seconds.observe(time.monotonic() - begun, {"op": op})

    def show(self, processes: Sequence[Mapping[str, Any]], names: set[str]) -> None:
        """What the models called ``names`` are like now, among the daemon's processes."""
        count: Tally[str] = Tally()
        size: Tally[str] = Tally()
        for process in processes:
            if process["name"] in names:
                count[process["state"]] += 1
                size[process["state"]] += process["mem_mb"] << 20
        for state in _STATES:
            self._models.set(count[state], {"state": state})
            self._bytes.set(size[state], {"state": state})
