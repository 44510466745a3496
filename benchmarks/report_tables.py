"""The tables and sentences that ``report.py`` puts into README.md and docs/, as Markdown."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable

from report_data import (
    FREES_NOTHING,
    WAYS,
    Device,
    Start,
    devices,
    in_order,
    newest,
    not_measured,
    of,
    sizes_of,
    ways_of,
)
from report_format import Page, counts, host, median, milliseconds, rate, seconds, spread, table
from report_line_rate import line_rate, line_rate_short, preload_cost
from report_ray import ray_calls, rlhf_loop

# -- GPUs -----------------------------------------------------------------------------------------


def for_each(page: Page, one: Callable[[Page, Device], str]) -> str:
    """A part for each kind of device that has something to show."""
    return "\n".join(filter(None, (one(page, device) for device in devices(page.results))))


def way_name(way: str) -> str:
    return f"**{WAYS[way]}**" if way == "gpusched" else WAYS[way]


def freeze_thaw(page: Page, device: Device) -> str:
    """Ways down, sizes across, freeze / thaw."""
    if not device.moves:
        return ""
    sizes = sizes_of(device)
    rows = []
    for way in ways_of(device):
        cells = [device.moves.get((size, way)) for size in sizes]
        rows.append(
            [way_name(way)]
            + [f"{median(c.freeze_ms)} / {median(c.thaw_ms)}" if c else "" for c in cells]
        )
    runs = counts(len(m.freeze_ms) for m in device.moves.values())
    return (
        f"{page.picture(plot_name('freeze_thaw', device), f'Freeze and thaw on {device.gpu}')}\n\n"
        f"Seconds to take a process's VRAM away / to bring it back, by its size:\n\n"
        f"{table(['', *(f'{size:g} GB' for size in sizes)], rows)}\n"
        f"{device.title('freeze_thaw')}; medians of {runs}, contents verified after each. "
        f"{page.links(p for m in device.moves.values() for p in m.paths)}\n"
    )


def freeze_thaw_full(page: Page, device: Device) -> str:
    """Every figure with its spread, and the plot."""
    if not device.moves:
        return ""
    rows = [
        [
            way_name(m.way),
            f"{m.gigabytes:g}",
            str(len(m.freeze_ms)),
            spread(m.freeze_ms),
            rate(m.gigabytes, m.freeze_ms),
            spread(m.thaw_ms),
            rate(m.gigabytes, m.thaw_ms),
            "all" if m.way == FREES_NOTHING else f"{m.left_mib} MiB",
        ]
        for m in in_order(device)
    ]
    head = ("way", "GB", "runs", "off, s", "GB/s", "back, s", "GB/s", "left on the GPU")
    skipped = "".join(
        f"\nNot measured: {WAYS[way]}{f' at {size:g} GB' if size else ''}: {why}.\n"
        for way, size, why in not_measured(device)
    )
    added = [m for m in in_order(device) if m.added_to_freeze_ms]
    over = [
        [f"{m.gigabytes:g}", str(len(m.added_to_freeze_ms)), *map(milliseconds, both)]
        for m in added
        for both in [(m.added_to_freeze_ms, m.added_to_thaw_ms)]
    ]
    text = (
        "\nWhat gpusched adds to the driver's own calls within the same freeze or thaw, as its client sees it:\n\n"
        f"{table(('GB', 'runs', 'freeze, ms', 'thaw, ms'), over)}"
    )
    text = text if over else ""
    return (
        f"{page.picture(plot_name('freeze_thaw', device), f'Freeze and thaw on {device.gpu}')}\n\n"
        f"{device.title('freeze_thaw')}. Median (minimum-maximum); contents verified after every run. From "
        f"{page.links(p for m in device.moves.values() for p in m.paths)}.\n\n"
        f"{table(head, rows)}{skipped}{text}{workload_starts(page, device)}"
    )


def workload_starts(page: Page, device: Device) -> str:
    """What a freeze and a thaw of the same process save, beside what they cost."""
    if not device.workload_starts_ms:
        return ""
    rows = []
    for size, times in sorted(device.workload_starts_ms.items()):
        moves = device.moves.get((size, "gpusched"))
        both = (spread(moves.freeze_ms), spread(moves.thaw_ms)) if moves else ("", "")
        rows.append([f"{size:g}", str(len(times)), spread(times), *both])
    head = ("GB", "starts", "cold start, s", "freeze, s", "thaw, s")
    return (
        "\nThe cold start of that process, from the request to run it until its contents are in VRAM and digested, "
        f"beside gpusched's freeze and thaw. It loads no framework and reads no file: a model has to, see above. "
        f"{page.links(device.workload_starts_from)}\n\n{table(head, rows)}"
    )


def runs_of(starts: Iterable[Start]) -> list[int]:
    """How often each was started, and how often frozen and thawed."""
    return [len(times) for start in starts for times in (start.cold_start_ms, start.thaw_ms)]


def cold_start(page: Page, device: Device) -> str:
    """The short table: what a thaw saves."""
    if not device.starts:
        return ""
    rows = []
    for start in device.starts.values():
        cold = statistics.median(start.cold_start_ms)
        back = statistics.median(start.thaw_to_token_ms)
        rows.append(
            [
                start.model,
                f"{start.vram_mib / 1024:.1f} GiB",
                f"{seconds(cold)} s",
                f"{median(start.import_ms)} s",
                f"{median(start.freeze_ms)} s",
                f"**{seconds(back)} s**",
                f"{cold / back:.0f} times",
            ]
        )
    head = (
        "model",
        "VRAM",
        "cold start",
        "of it imports",
        "freeze",
        "thaw to first token",
        "sooner",
    )
    return (
        f"{table(head, rows)}\n"
        f"{device.title('cold_start')}; medians of {counts(runs_of(device.starts.values()))}; after every thaw "
        f"the token and a digest of all weights were the same. "
        f"{page.links(p for s in device.starts.values() for p in s.paths)}\n"
    )


def cold_start_full(page: Page, device: Device) -> str:
    if not device.starts:
        return ""
    parts = (
        ("cold start", "cold_start_ms"),
        ("- interpreter and imports", "import_ms"),
        ("- weights", "load_ms"),
        ("- first token", "first_token_ms"),
        ("freeze", "freeze_ms"),
        ("thaw", "thaw_ms"),
        ("thaw to first token", "thaw_to_token_ms"),
    )
    starts = list(device.starts.values())
    rows = [[name, *(spread(getattr(start, key)) for start in starts)] for name, key in parts]
    about = (
        f"{s.model} {s.parameters:,} parameters, a file of {s.file_bytes / 1e9:.2f} GB, {s.vram_mib} MiB of VRAM"
        for s in starts
    )
    return (
        f"{page.picture(plot_name('cold_start', device), f'Cold start and thaw on {device.gpu}')}\n\n"
        f"{device.title('cold_start')}. Seconds, median (minimum-maximum) of {counts(runs_of(starts))}. "
        f"{'; '.join(about)}. From {page.links(p for s in starts for p in s.paths)}.\n\n"
        f"{table(['seconds', *(s.model for s in starts)], rows)}"
    )


def plot_name(kind: str, device: Device) -> str:
    return f"{kind}-{device.slug}.svg"


# -- no GPU ---------------------------------------------------------------------------------------


def control_plane(page: Page) -> str:
    """What gpusched itself costs, in two sentences."""
    found = newest(of(page.results, "control_plane"), "results")
    if found is None:
        return ""
    figures, path = found.data["results"], os.path.relpath(found.path, page.directory)
    status, command, freeze, thaw = (
        figures[name]
        for name in (
            "status_under_load_ms",
            "status_command_loaded_ms",
            "freeze_over_driver_loaded_ms",
            "thaw_over_driver_loaded_ms",
        )
    )
    return (
        f"On {host(found.machine)}, with [{found.data['processes']} managed processes and\n"
        f"{found.data['slow_freezes']} slow freezes under way]({path}), `status` over the socket takes\n"
        f"{status['median']:.2f} ms (median; 99th percentile {status['p99']:.1f} ms), and the whole command "
        f"`gpusched status` {command['median']:.0f} ms.\nWhat gpusched adds to the driver's own calls there: "
        f"{freeze['median']:.1f} ms to a freeze, {thaw['median']:.1f} ms to a thaw (medians, simulated\ndriver).\n"
    )


def control_plane_full(page: Page) -> str:
    found = newest(of(page.results, "control_plane"), "results")
    if found is None:
        return ""
    names = {
        "status_ms": "`status` over the socket",
        "status_under_load_ms": "`status` over the socket, loaded",
        "status_command_ms": "the command `gpusched status`",
        "status_command_loaded_ms": "the command `gpusched status`, loaded",
        "run_ms": "`run`, until the program has started",
        "freeze_over_driver_ms": "a freeze, beyond the driver's calls",
        "freeze_over_driver_loaded_ms": "a freeze, beyond the driver's calls, loaded",
        "thaw_over_driver_ms": "a thaw, beyond the driver's calls",
        "thaw_over_driver_loaded_ms": "a thaw, beyond the driver's calls, loaded",
    }
    figures = found.data["results"]
    rows = [
        [text, *(f"{figures[name][key]:.2f}" for key in ("median", "p99", "max"))]
        for name, text in names.items()
        if name in figures
    ]
    return (
        f"On {host(found.machine)}, simulated GPUs. Loaded: with {found.data['processes']} managed processes, and for "
        f"`status` also {found.data['slow_freezes']} slow freezes under way. {page.link(found.path)}\n\n"
        f"{table(['milliseconds', 'median', '99th percentile', 'maximum'], rows)}"
    )


def hibernate(page: Page) -> str:
    """To disk, back, and into copies; each result by itself."""
    texts = []
    for found in of(page.results, "hibernate"):
        measured = found.data["measured"]
        on_gpu = found.data["backend"] == "cuda"
        about = f"on an {found.machine['gpus'][0]['name']}" if on_gpu else "and no GPU state"
        rows = [
            ["hibernate", seconds(measured["hibernate_ms"]["median"])],
            ["wake", seconds(measured["wake_ms"]["median"])],
            *(
                [f"fork into {count}", seconds(one["median"])]
                for count, one in measured.get("fork_ms", {}).items()
            ),
        ]
        texts.append(
            f"A process with {found.data['gigabytes']:g} GB {about}, on {host(found.machine)}; contents "
            f"verified after every wake and in every copy. The image is written at "
            f"{measured['save']['share_of_disk']:.0%} of the disk's own sequential bandwidth in the same run, "
            f"checksums and commit included, and comes back at "
            f"{measured['revive']['share_of_disk']:.0%}. {page.link(found.path)}\n\n"
            f"{table(['', 'seconds, median of ' + str(measured['wake_ms']['runs'])], rows)}"
        )
    return "\n".join(texts)


def soak(page: Page) -> str:
    """The tests with their full counts, and what was flat over the swaps."""
    found = newest(page.results, "soak")
    if found is None:
        return ""
    data = found.data
    text = (
        f"Commit {data['commit']}, on {host(found.machine)}: {data['passed']} tests passed, "
        f"{len(data['failed'])} failed, {data['skipped']} were skipped, in {data['seconds']:.0f} s. "
        f"{page.link(found.path)}\n"
    )
    swaps = data.get("swaps")
    if not swaps:
        return text
    first, last = swaps["first"], swaps["last"]
    rows = [[what, str(first[what]), str(last[what])] for what in first]
    return (
        f"{text}\n{swaps['cycles']} swaps there and back of two workloads on a simulated GPU, before the first (after "
        f"{swaps['warm_up']} for warming up) and after the last:\n\n{table(['', 'before', 'after'], rows)}"
    )


BLOCKS: dict[str, Callable[[Page], str]] = {
    "freeze_thaw": lambda page: for_each(page, freeze_thaw),
    "freeze_thaw_full": lambda page: for_each(page, freeze_thaw_full),
    "cold_start": lambda page: for_each(page, cold_start),
    "cold_start_full": lambda page: for_each(page, cold_start_full),
    "control_plane": control_plane,
    "control_plane_full": control_plane_full,
    "hibernate": hibernate,
    "line_rate": line_rate,
    "line_rate_short": line_rate_short,
    "preload_cost": preload_cost,
    "rlhf_loop": rlhf_loop,
    "ray_calls": ray_calls,
    "soak": soak,
}
