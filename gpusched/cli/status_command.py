"""``gpusched status``: columns in a pipe, tables with bars on a terminal.

The columns and their order are stable (docs/cli.md); memory is in MiB there. Fields that an older daemon does not send
show as ``-``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from gpusched.cli import output, params
from gpusched.units import MIB, format_size

if TYPE_CHECKING:
    from rich.text import Text

_BAR_CELLS: Final = 20
_STATE_STYLE: Final = {
    "active": "green",
    "frozen": "cyan",
    "hibernated": "blue",
    "dead": "bright_black",
    "failed": "bold red",
}


@click.command("status", cls=params.Command)
@params.json_option
def status_command(as_json: bool) -> None:
    """Show GPUs, processes and host RAM."""
    status: dict[str, Any] = dict(params.connect().status())
    if as_json:
        output.print_json(status)
    elif sys.stdout.isatty():
        _print_tables(status)
    else:
        _print_plain(status)


def _notes(process: dict[str, Any]) -> str:
    """What one wants to know beyond the state: leases, and how it ended."""
    notes = []
    if process.get("leases"):
        notes.append("leased")
    notes += [word for word in ("evictable", "adopted") if process.get(word)]
    if not process.get("stop", True):
        notes.append("not stopped")
    if process.get("exit_code") is not None:
        notes.append(f"exit {process['exit_code']}")
    if process.get("exit_signal") is not None:
        notes.append(f"signal {process['exit_signal']}")
    return ", ".join(notes)


def _gpus(process: dict[str, Any]) -> str:
    return ",".join(map(str, process.get("gpus") or [process["gpu"]]))


def _mark(status: dict[str, Any]) -> str:
    return " [simulated]" if status["capabilities"].get("simulated") else ""


def _print_plain(status: dict[str, Any]) -> None:
    output.print_columns(
        ("GPU", "TOTAL_MB", "USED_MB", "FREE_MB", "NAME"),
        [
            (
                g["index"],
                g["mem_total_mb"],
                g["mem_used_mb"],
                g["mem_free_mb"],
                g["name"] + _mark(status),
            )
            for g in status["gpus"]
        ],
    )
    click.echo()
    output.print_columns(
        ("NAME", "STATE", "TIER", "GPU", "MEM_MB", "AGE", "PID", "USER", "NOTES"),
        [
            (
                *(p["name"], p["state"], p["tier"], _gpus(p), p["mem_mb"], p["age"], p["pid"]),
                *(
                    p.get("user") or "-",
                    ", ".join(filter(None, (_notes(p), p.get("error")))) or "-",
                ),
            )
            for p in status["processes"]
        ],
    )
    click.echo()
    memory = status["memory"]
    output.print_columns(
        ("RAM_TOTAL_MB", "RAM_FREE_MB", "SNAPSHOTS_MB", "BUDGET_MB"),
        [
            (
                *(memory["host_ram_total_mb"], memory["host_ram_free_mb"]),
                *(memory["snapshots_mb"], memory["host_ram_budget_mb"]),
            )
        ],
    )


def _print_tables(status: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_gpu_table(status))
    if status["processes"]:
        console.print(_process_table(status))
        for process in status["processes"]:
            if process.get("error"):
                text = f"{process['name']}: {process['error']}"
                console.print(output.clean(text), style="red", soft_wrap=True)
    else:
        console.print("no processes; start one with `gpusched run -- CMD`", style="dim")
    metrics = status["metrics"]
    console.print(
        f"{metrics['freezes']} freezes (average {metrics['avg_freeze_ms']} ms), "
        f"{metrics['thaws']} thaws (average {metrics['avg_thaw_ms']} ms){_mark(status)}",
        style="dim",
    )


def _gpu_table(status: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("MEMORY", ""):
        table.add_column(title, no_wrap=True)
    for title in ("USED", "TOTAL"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("NAME")
    for gpu in status["gpus"]:
        used, total = gpu["mem_used_mb"], gpu["mem_total_mb"]
        name = output.clean(gpu["name"]) + _mark(status)
        table.add_row(f"GPU {gpu['index']}", _bar(used, total), _size(used), _size(total), name)
    memory = status["memory"]
    total = memory["host_ram_total_mb"]
    used = total - memory["host_ram_free_mb"]
    snapshots = (
        f"snapshots {_size(memory['snapshots_mb'])} of {_size(memory['host_ram_budget_mb'])}"
    )
    table.add_row("RAM", _bar(used, total), _size(used), _size(total), snapshots)
    return table


def _process_table(status: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    # Only the first and the last column may be broken into lines: a figure that is cut is worse than none.
    table.add_column("NAME", overflow="fold")
    for title in ("STATE", "GPU", "MEM", "AGE", "PID", "USER"):
        right = title in ("MEM", "PID")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    table.add_column("NOTES")
    for p in status["processes"]:
        state = Text(p["state"], style=_STATE_STYLE.get(p["state"], "yellow"))
        row = (
            _gpus(p),
            _size(p["mem_mb"]),
            p["age"],
            str(p["pid"]),
            p.get("user") or "-",
            _notes(p),
        )
        table.add_row(output.clean(p["name"]), state, *row)
    return table


def _size(mem_mb: int) -> str:
    return format_size(mem_mb * MIB)


def _bar(used: int, total: int) -> Text:
    from rich.text import Text

    share = min(1.0, max(0.0, used / total)) if total else 0.0
    filled = round(share * _BAR_CELLS)
    colour = "green" if share < 0.7 else "yellow" if share < 0.9 else "red"
    return Text("█" * filled, style=colour) + Text(
        "░" * (_BAR_CELLS - filled), style="bright_black"
    )
