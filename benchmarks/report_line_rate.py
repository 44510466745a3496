"""The tables of ``line_rate.py`` and ``preload_cost.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
    """All runs on one kind of device; ``runs`` by (GB, busy or idle, way)."""

    gpu: str
    driver: str
    results: list[Result]
    runs: dict[tuple[float, str, str], list[Any]]

    @property
    def title(self) -> str:
        return f"{self.gpu}, driver {self.driver}"


def line_rates(results: Iterable[Result]) -> list[LineRate]:
    """Joined over the files of one kind of device; each run knows the ceiling of its file."""
    found: dict[tuple[str, str], LineRate] = {}
    for result in of(results, "line_rate"):
        gpu, driver = result.device
        new = LineRate(gpu=gpu, driver=driver, results=[], runs={})
        rates = found.setdefault(result.device, new)
        rates.results.append(result)
        for row in result.data["rows"]:
            for way, some in row["ways"].items():
                into = rates.runs.setdefault((row["gigabytes"], row["kind"], way), [])
                into += [run | {"ceiling": result.data["ceiling"]} for run in some]
    return [found[device] for device in sorted(found)]


def line_rate(page: Page) -> str:
    """Past the driver's copy and by it: all that was measured."""
    return "\n".join(_tables(page, lambda _gigabytes, _kind: True))


def line_rate_short(page: Page) -> str:
    """The same, of a busy program with contents that are large beside its context."""
    return "\n".join(_tables(page, lambda gb, kind: (gb, kind) == (SHORT_GB, "busy")))


def _tables(page: Page, shown: Callable[[float, str], bool]) -> Iterator[str]:
    for rates in line_rates(page.results):
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
        yield (
            f"{page.picture(plot_name(rates), f'Past the copy of the driver on {rates.gpu}')}\n\n"
            f"{rates.title}. A pinned copy in the same runs, the ceiling: {to_host} GB/s off, {to_device} "
            f'GB/s back; "of it": what really moved, scratch memory included, against that. Median '
            f"(minimum-maximum). {page.links(result.path for result in rates.results)}\n\n"
            f"{table(head, rows)}"
        )


def plot_name(rates: LineRate) -> str:
    return f"line_rate-{slug(rates.gpu, rates.driver)}.svg"


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
    rows = []
    for what in runs["with"][0]:
        without, with_ = (
            [run[what] for run in runs[which] if what in run] for which in ("without", "with")
        )
        rows.append([what, *(f"{statistics.median(one):.2f}" for one in (without, with_))])
    return (
        f"On {host(found.machine)}; medians of {counts([len(runs['with'])])}, each the least of several loops. "
        f"{page.link(found.path)}\n\n{table(('microseconds', 'without', 'with'), rows)}"
    )
