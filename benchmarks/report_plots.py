"""The plots that ``report.py`` makes, as SVG. Needs matplotlib, which only the dev extra has.

Each file carries a digest of what it was made from: the figures and this module. So whether it is up to date can be
told without drawing it anew (and without matplotlib, whose versions draw the same thing differently).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from report_data import WAYS, Device, devices, sizes_of, ways_of
from report_format import Page, seconds
from report_line_rate import LINE_RATE_WAYS, LineRate, line_rates
from report_line_rate import plot_name as line_rate_plot
from report_tables import plot_name

# Okabe and Ito's colours: told apart by colour-blind people, and in grey.
OFF, BACK = "#0072B2", "#E69F00"
PARTS = ("#999999", "#56B4E9", "#D55E00")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "gpusched",
    "savefig.facecolor": "white",
}


def wanted(page: Page) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """File name -> (digest of what it shows, how to draw it)."""
    found: dict[str, tuple[str, Callable[[Any], Any]]] = {}
    for device in devices(page.results):
        if device.moves:
            shown = [asdict(moves) | {"paths": None} for moves in device.moves.values()]
            found[plot_name("freeze_thaw", device)] = (
                digest(device.title("freeze_thaw"), shown),
                partial(freeze_thaw, device),
            )
        if device.starts:
            shown = [asdict(start) | {"paths": None} for start in device.starts.values()]
            found[plot_name("cold_start", device)] = (
                digest(device.title("cold_start"), shown),
                partial(cold_start, device),
            )
    for rates in line_rates(page.results):
        runs = [
            [*key, run["freeze_ms"], run["thaw_ms"]] for key, of in rates.runs.items() for run in of
        ]
        ceilings = [result.data["ceiling"] for result in rates.results]
        found[line_rate_plot(rates)] = (
            digest(rates.title, [runs, ceilings]),
            partial(line_rate, rates),
        )
    return found


def digest(title: str, shown: Any) -> str:
    text = json.dumps([title, shown], sort_keys=True) + Path(__file__).read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_in(path: Path) -> str | None:
    """What the file says that it was made from; None where there is no such file."""
    if not path.exists():
        return None
    found = re.search(r"made from ([0-9a-f]{16})", path.read_text())
    return found[1] if found else ""


def draw(path: Path, made_from: str, plot: Callable[[Any], Any]) -> None:
    """Raises ImportError without matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = plot(plt)
        about = {"Date": None, "Description": f"made from {made_from}"}
        figure.savefig(path, metadata=about, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)
    # matplotlib leaves blanks at the ends of lines, which git complains about
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def freeze_thaw(device: Device, plt: Any) -> Any:
    """The ways to take VRAM away and bring it back; sizes that more than one was measured with."""
    ways, sizes = ways_of(device), sizes_of(device)
    sizes = [
        size for size in sizes if sum((size, way) in device.moves for way in ways) > 1
    ] or sizes
    moves = {key: (found.freeze_ms, found.thaw_ms) for key, found in device.moves.items()}
    names = {way: WAYS[way] for way in ways}
    return by_size(plt, sizes, names, moves, ["gpusched"], device.title("freeze_thaw"))


def line_rate(rates: LineRate, plt: Any) -> Any:
    """Past the driver's copy, by it, and the ceiling; a busy program."""
    moves: dict[tuple[float, str], tuple[Sequence[float], Sequence[float]]] = {}
    for (size, kind, way), runs in rates.runs.items():
        if kind == "busy":
            off, back = ([run[key] for run in runs] for key in ("freeze_ms", "thaw_ms"))
            moves[size, way] = off, back
    for size in {size for size, _ in moves}:
        ceilings = [result.data["ceiling"] for result in rates.results]
        off, back = (
            [size / one[key] * 1000 for one in ceilings]
            for key in ("to_host_gb_s", "to_device_gb_s")
        )
        moves[size, "ceiling"] = off, back
    names = LINE_RATE_WAYS | {"ceiling": "pinned copy, the ceiling"}
    sizes = sorted({size for size, _ in moves})
    return by_size(plt, sizes, names, moves, ["context", "deep"], f"{rates.title}, a busy program")


def by_size(
    plt: Any,
    sizes: Sequence[float],
    names: Mapping[str, str],
    moves: Mapping[tuple[float, str], tuple[Sequence[float], Sequence[float]]],
    ours: Sequence[str],
    about: str,
) -> Any:
    """One panel for each size in GB; the ways of ``names`` from top to bottom, off and back in milliseconds."""
    ways = list(names)[::-1]
    figure, panels = plt.subplots(
        *(1, len(sizes)),
        sharey=True,
        squeeze=False,
        figsize=(3.0 + 2.9 * len(sizes), 1.2 + 0.62 * len(ways)),
    )
    for panel, size in zip(panels[0], sizes, strict=True):
        longest = 0.0
        for place, way in enumerate(ways):
            off, back = moves.get((size, way), ((), ()))
            for shift, colour, values in ((0.2, OFF, off), (-0.2, BACK, back)):
                if not values:
                    continue
                longest = max(longest, bar(panel, place + shift, values, colour))
        finish(panel, longest, f"{size:g} GB")
    panels[0][0].set_yticks(range(len(ways)), [names[way] for way in ways])
    for label, way in zip(panels[0][0].get_yticklabels(), ways, strict=True):
        label.set_fontweight("bold" if way in ours else "normal")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (OFF, BACK)]
    what = ["VRAM to host RAM (freeze)", "back to VRAM (thaw)"]
    title = "Taking a process's VRAM away and bringing it back"
    caption(figure, handles, what, title, about)
    return figure


def cold_start(device: Device, plt: Any) -> Any:
    """For each model: the cold start in its parts, the freeze, and the thaw with its first token."""
    starts = list(device.starts.values())
    figure, panels = plt.subplots(
        *(1, len(starts)), sharey=True, squeeze=False, figsize=(2.2 + 4.2 * len(starts), 2.5)
    )
    for panel, start in zip(panels[0], starts, strict=True):
        left = 0.0
        for colour, values in zip(
            PARTS, (start.import_ms, start.load_ms, start.first_token_ms), strict=True
        ):
            width = statistics.median(values) / 1000
            panel.barh(2, width, 0.55, left, color=colour)
            left += width
        total = statistics.median(start.cold_start_ms)
        label(panel, 2, left, f"{seconds(total)} s")
        longest = max(left, bar(panel, 1, start.freeze_ms, OFF))
        longest = max(longest, bar(panel, 0, start.thaw_to_token_ms, BACK))
        finish(panel, longest, f"{start.model}, {start.vram_mib / 1024:.1f} GiB of VRAM")
    panels[0][0].set_yticks((2, 1, 0), ["cold start", "freeze", "thaw to first token"])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS]
    names = ["interpreter and imports", "weights from a file in RAM", "first token"]
    caption(
        figure,
        handles,
        names,
        "From nothing, and from frozen, to the first token",
        device.title("cold_start"),
    )
    return figure


def bar(panel: Any, place: float, values_ms: Sequence[float], colour: str) -> float:
    """The median as a bar, minimum and maximum as a whisker; returns where it ends."""
    middle, low, high = (f(values_ms) / 1000 for f in (statistics.median, min, max))
    panel.barh(place, middle, 0.36 if place % 1 else 0.55, color=colour)
    if high > low:
        errors = [[middle - low], [high - middle]]
        panel.errorbar(middle, place, xerr=errors, color="#333333", capsize=2, linewidth=0.8)
    label(panel, place, high, seconds(1000 * middle) + ("" if place % 1 else " s"))
    return float(high)


def label(panel: Any, place: float, end: float, text: str) -> None:
    panel.annotate(
        text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5
    )


def finish(panel: Any, longest: float, title: str) -> None:
    panel.set_title(title, fontsize=10.5)
    panel.set_xlim(0, longest * 1.24)
    panel.set_xlabel("seconds", fontsize=9)
    panel.grid(axis="x", color="#dddddd", linewidth=0.7)
    panel.tick_params(axis="y", length=0)


def caption(figure: Any, handles: Iterable[Any], names: list[str], title: str, about: str) -> None:
    figure.tight_layout()
    height = figure.get_size_inches()[1]
    whiskers = "medians, whiskers from minimum to maximum"
    figure.suptitle(f"{title}\n{about}; {whiskers}", y=1 + 0.42 / height, fontsize=11.5)
    figure.legend(
        handles, names, loc="upper center", ncols=len(names), frameon=False,
        bbox_to_anchor=(0.5, 0.02), fontsize=9.5,
    )  # fmt: skip
