"""The tables of ``line_rate.py`` and ``preload_cost.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from preload_cost import median_us, share_added
from report_data import Result, newest, of, slug
from report_format import Page, counts, host, rate, spread, table

LINE_RATE_WAYS = {
    "context": "past the driver, its context stays",
    "deep": "past the driver, nothing stays",
    "bare": "the driver's calls, one process",
    "fresh": "the driver's calls, a process for each",
}


#: What the one page shows of it: a busy program whose contents are large beside its context.
SHORT_GB = 15.0


@dataclass(frozen=True, kw_only=True)
class LineRate:
    """All runs on one kind of device and machine; ``runs`` by (GB, busy or idle, way)."""

    gpu: str
    driver: str
    gpus: int  # of the machine: one of several has another way to its host
    results: list[Result]
    runs: dict[tuple[float, str, str], list[Any]]

    @property
    def title(self) -> str:
        among = f", one of the {self.gpus} in its machine" if self.gpus > 1 else ""
        return f"{self.gpu}, driver {self.driver}{among}"


def line_rates(results: Iterable[Result]) -> list[LineRate]:
    """Joined over the files of one kind of device and machine; each run knows the ceiling of its file."""
    found: dict[tuple[str, str, int], LineRate] = {}
    for result in of(results, "line_rate"):
        gpu, driver = result.device
        gpus = len(result.machine["gpus"])
        new = LineRate(gpu=gpu, driver=driver, gpus=gpus, results=[], runs={})
        rates = found.setdefault((gpu, driver, gpus), new)
        rates.results.append(result)
        for row in result.data["rows"]:
            for way, some in row["ways"].items():
                into = rates.runs.setdefault((row["gigabytes"], row["kind"], way), [])
                into += [run | {"ceiling": result.data["ceiling"]} for run in some]
    return [found[key] for key in sorted(found)]


def line_rate(page: Page) -> str:
    """Past the driver's copy and by it: all that was measured."""
    return "\n".join(
        f"{page.picture(plot_name(rates), f'Past the copy of the driver on {rates.gpu}')}\n\n"
        f"{_table(page, rates, lambda _gigabytes, _kind: True)}"
        for rates in line_rates(page.results)
    )


def line_rate_short(page: Page) -> str:
    """The same, of a busy program with contents that are large beside its context."""
    found = line_rates(page.results)
    pictures = [
        f"{page.picture(plot_name(rates), f'Past the copy of the driver on {rates.gpu}')}\n"
        for rates in found[:1]
    ]
    tables = [
        _table(page, rates, lambda gb, kind: (gb, kind) == (SHORT_GB, "busy")) for rates in found
    ]
    return "\n".join(pictures + tables)


def _table(page: Page, rates: LineRate, shown: Callable[[float, str], bool]) -> str:
    rows = []
    for gigabytes, kind in sorted({key[:2] for key in rates.runs if shown(*key[:2])}):
        for way in (w for w in LINE_RATE_WAYS if (gigabytes, kind, w) in rates.runs):
            some = rates.runs[gigabytes, kind, way]
            off, on = ([run[key] for run in some] for key in ("freeze_ms", "thaw_ms"))
            rows.append(
                [
                    *(LINE_RATE_WAYS[way], f"{gigabytes:g} {kind}", str(len(some))),
                    *(spread(off), rate(gigabytes, off), _share(some, "freeze_ms", "to_host")),
                    *(spread(on), rate(gigabytes, on), _share(some, "thaw_ms", "to_device")),
                ]
            )
    to_host, to_device = (
        "-".join(sorted({str(one.data["ceiling"][key]) for one in rates.results}))
        for key in ("to_host_gb_s", "to_device_gb_s")
    )
    head = ("way", "GB", "runs", "off, s", "GB/s", "of it", "back, s", "GB/s", "of it")
    return (
        f"{rates.title}. A pinned copy in the same runs, the ceiling: {to_host} GB/s off, {to_device} "
        f'GB/s back; "of it": what really moved, scratch memory included, against that. Median '
        f"(minimum-maximum). {page.links(result.path for result in rates.results)}\n\n"
        f"{table(head, rows)}"
    )


def plot_name(rates: LineRate) -> str:
    among = f"-of-{rates.gpus}" if rates.gpus > 1 else ""
    return f"line_rate-{slug(rates.gpu, rates.driver)}{among}.svg"


def _share(runs: list[Any], key: str, direction: str) -> str:
    """The median of what share of the ceiling the bytes that really moved had."""
    shares = [
        run["moved_bytes"] / run[key] / 1e6 / run["ceiling"][f"{direction}_gb_s"]
        for run in runs
        if run.get("moved_bytes")
    ]
    return f"{statistics.median(shares):.2f}" if shares else ""


def preload_cost(page: Page) -> str:
    """What the preloaded library costs, with and without."""
    found = newest(of(page.results, "preload_cost"), "runs")
    if found is None:
        return ""
    runs = found.data["runs"]
    rows = [
        [
            what,
            *(f"{median_us(runs, what, each):.2f}" for each in ("without", "with")),
            f"{share_added(runs, what):+.1%}",
        ]
        for what in runs[0]
    ]
    turns = sum(len(run["launch"]["with"]) for run in runs)
    return (
        f"On {host(found.machine)}; medians of {turns} turns in {counts([len(runs)])}. {page.link(found.path)}\n\n"
        f"{table(('microseconds', 'without', 'with', 'more'), rows)}"
    )
