"""How figures, tables and links are written in the documents."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_data import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Where a block stands, for the links in it, and the results that it may use."""

    directory: Path
    plots: Path
    results: Sequence[Result]

    def link(self, path: Path) -> str:
        return f"[{path.name}]({os.path.relpath(path, self.directory)})"

    def links(self, paths: Iterable[Path]) -> str:
        return ", ".join(self.link(path) for path in sorted(set(paths)))

    def picture(self, name: str, text: str) -> str:
        return f"![{text}]({os.path.relpath(self.plots / name, self.directory)})"


# -- figures --------------------------------------------------------------------------------------


def seconds(milliseconds: float) -> str:
    """Three figures where there are so many."""
    value = milliseconds / 1000
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def median(values: Sequence[float]) -> str:
    return seconds(statistics.median(values))


def spread(values: Sequence[float]) -> str:
    """The median, and minimum and maximum where there are several."""
    if len(values) == 1:
        return median(values)
    return f"{median(values)} ({seconds(min(values))}-{seconds(max(values))})"


def milliseconds(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f}-{max(values):.1f})"


def rate(gigabytes: float, values_ms: Sequence[float]) -> str:
    """Decimal GB a second."""
    found = gigabytes / statistics.median(values_ms) * 1000
    return f"{found:.0f}" if found >= 10 else f"{found:.1f}"


def counts(runs: Iterable[int]) -> str:
    """As in "3 runs", "1 run", "1 to 6 runs"."""
    least, most = min(found := list(runs)), max(found)
    many = f"{most} run{'s' if most > 1 else ''}"
    return many if least == most else f"{least} to {many}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is words, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def host(machine: Any) -> str:
    gpus = [gpu["name"] for gpu in machine["gpus"]]
    where = f" and {len(gpus)} {gpus[0]}" if gpus else ""
    return f"a machine with {machine['cores']} cores, {machine['ram_gib']:.0f} GiB of RAM{where}"
