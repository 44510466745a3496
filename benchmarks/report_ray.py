"""The tables of ``rlhf_loop.py`` and ``ray_calls.py``."""

from __future__ import annotations

from typing import Any

from report_data import Result, newest, of
from report_format import Page, host, table

LOOP_WAYS = {
    "gpusched": "**gpusched**",
    "to_cpu": '.to("cpu") and back',
    "resident": "all stay on the GPU",
}


def rlhf_loop(page: Page) -> str:
    """Seconds for a step by each way, the newest file of each device and sizes."""
    found: dict[tuple[Any, ...], Result] = {}
    for result in of(page.results, "rlhf_loop"):
        sizes = tuple(
            result.data["sizes_bytes"][role] for role in ("policy", "reward", "reference")
        )
        found[(*result.device, sizes)] = result
    return "\n".join(_loop(page, key[2], result) for key, result in sorted(found.items()))


def _loop(page: Page, sizes: tuple[int, ...], result: Result) -> str:
    ways, rows, skipped = result.data["ways"], [], ""
    for way in (way for way in LOOP_WAYS if way in ways):
        one = ways[way]
        if "skipped" in one:
            skipped += f"\nNot measured: {LOOP_WAYS[way]}: {one['skipped']}.\n"
            continue
        rows.append(
            [
                LOOP_WAYS[way],
                str(one["step_s"]["runs"]),
                *(_spread(one[key]) for key in ("step_s", "swap_s")),
                f"{one['swap_share']:.0%}",
            ]
        )
    gpu, driver = result.device
    policy, reward, reference = (f"{size / 1e9:g}" for size in sizes)
    right = all(one.get("contents_right", True) for one in ways.values())
    return (
        f"{gpu}, driver {driver}, Ray {result.data['ray']}; weights of {policy} GB (policy), {reward} GB (reward) and "
        f"{reference} GB (reference), {result.data['passes']} passes through a model in a phase. Median "
        f"(minimum-maximum); the contents of all models were {'the same' if right else 'NOT THE SAME'} at the end. "
        f"{page.link(result.path)}\n\n"
        f"{table(('way', 'steps', 'a step, s', 'of it swaps, s', 'share of swaps'), rows)}{skipped}"
    )


def _spread(summary: Any) -> str:
    """Of a summary, in its own unit."""
    if summary["runs"] == 1:
        return f"{summary['median']:.2f}"
    return f"{summary['median']:.2f} ({summary['min']:.2f}-{summary['max']:.2f})"


def ray_calls(page: Page) -> str:
    """A call on a freezable model beside one on a plain actor, and large payloads beside a warm copy."""
    found = newest(of(page.results, "ray_calls"), "judged")
    if found is None:
        return ""
    data, judged, mib = found.data, found.data["judged"], found.data["mib"]
    rows = [
        [what, *(_spread(data[who][key]) for who in ("plain", "hosted"))]
        for key, what in (
            ("tiny_ms", "a call with one number"),
            ("in_ms", f"{mib} MiB by ObjectRef into the model"),
            ("out_ms", f"{mib} MiB as a result"),
        )
    ]
    shares = [
        [what, *(f"{judged[f'{who}{key}_share_of_memcpy']:.2f}" for who in ("plain_", ""))]
        for key, what in (("in", "into the model"), ("out", "as a result"))
    ]
    runs = data["hosted"]
    return (
        f"On {host(found.machine)}, Ray {data['ray']}; both called by turns, {runs['tiny_ms']['runs']} tiny and "
        f"{runs['in_ms']['runs']} large calls of each kind. A warm copy of the same {mib} MiB took "
        f"{_spread(data['memcpy_ms'])} ms. A tiny call costs {judged['tiny_over_plain_ms']:.2f} ms more than on a "
        f"plain actor. {page.link(found.path)}\n\n"
        f"{table(('milliseconds, median (minimum-maximum)', 'plain actor', '**freezable**'), rows)}\n"
        f"{table(('rate, as a share of the warm copy', 'plain actor', '**freezable**'), shares)}"
    )
