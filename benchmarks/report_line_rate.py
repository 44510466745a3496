"""The tables of ``line_rate.py`` and ``preload_cost.py``."""

from __future__ import annotations

import statistics
from typing import Any

from report_data import Result, newest, of
from report_format import Page, counts, host, rate, spread, table

LINE_RATE_WAYS = {
    "context": "past the driver, its context stays",
    "deep": "past the driver, nothing stays",
    "bare": "the driver's calls, one process",
    "fresh": "the driver's calls, a process for each",
}


def line_rate(page: Page) -> str:
    """Past the driver's copy and by it, joined over the files of one kind of device."""
    texts = []
    found: dict[tuple[str, str], list[Result]] = {}
    for result in of(page.results, "line_rate"):
        found.setdefault(result.device, []).append(result)
    for (gpu, driver), results in sorted(found.items()):
        runs: dict[tuple[float, str, str], list[Any]] = {}
        for result in results:
            for row in result.data["rows"]:
                for way, some in row["ways"].items():
                    into = runs.setdefault((row["gigabytes"], row["kind"], way), [])
                    into += [run | {"ceiling": result.data["ceiling"]} for run in some]
        rows = []
        for gigabytes, kind in sorted({key[:2] for key in runs}):
            for way in (w for w in LINE_RATE_WAYS if (gigabytes, kind, w) in runs):
                some = runs[gigabytes, kind, way]
                off, on = ([run[key] for run in some] for key in ("freeze_ms", "thaw_ms"))
                rows.append(
                    [
                        *(LINE_RATE_WAYS[way], f"{gigabytes:g} {kind}", str(len(some))),
                        *(spread(off), rate(gigabytes, off), _share(some, "freeze_ms", "to_host")),
                        *(spread(on), rate(gigabytes, on), _share(some, "thaw_ms", "to_device")),
                    ]
                )
        rates = [result.data["ceiling"] for result in results]
        to_host, to_device = (
            "-".join(sorted({str(one[key]) for one in rates}))
            for key in ("to_host_gb_s", "to_device_gb_s")
        )
        head = ("way", "GB", "runs", "off, s", "GB/s", "of it", "back, s", "GB/s", "of it")
        texts.append(
            f"{gpu}, driver {driver}. A pinned copy in the same runs, the ceiling: {to_host} GB/s off, {to_device} "
            f'GB/s back; "of it": what really moved, scratch memory included, against that. Median '
            f"(minimum-maximum). {page.links(result.path for result in results)}\n\n"
            f"{table(head, rows)}"
        )
    return "\n".join(texts)


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
