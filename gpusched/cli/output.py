"""Everything that commands print: result lines, JSON, errors, and progress while one waits.

Results go to stdout, all else to stderr. Lines that scripts grep for have the same characters on a terminal and in a
pipe; on a terminal words are coloured, which click takes out elsewhere. ``rich`` is imported when something takes
longer than a moment, never before. Does not cover: the tables of ``status`` (``status_command.py``).
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import click

from gpusched.cli.params import JSON
from gpusched.errors import GpuschedError, to_wire

#: Anything that takes longer than this shows that it goes on, and for how long.
_PROGRESS_AFTER_S: Final = 0.7


def never_fail_on_characters() -> None:
    """An arrow or a byte of a log that the terminal's encoding lacks must not end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def style(text: str, **how: Any) -> str:
    """``text`` with colour, unless the user wants none (https://no-color.org); click drops it outside terminals."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **how)


def clean(text: object) -> str:
    """``text`` on one line, without control characters that would steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def print_json(value: object) -> None:
    """One JSON value: on one line in a pipe, indented on a terminal."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def print_json_line(value: object) -> None:
    """One JSON value of a stream: always one line, and not held back in a buffer."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Titles and rows in columns two blanks apart; the last column is as long as it likes."""
    cells = [tuple(titles), *(tuple(clean(cell) for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles) - 1)]
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*padded, row[-1]]))


def print_result(verb: str, rest: str, result: dict[str, Any], *, colour: str = "green") -> None:
    """``VERB REST``, with a mark behind it when no real GPU was involved."""
    mark = style(" [simulated]", dim=True) if result.get("simulated") else ""
    click.echo(f"{style(verb, fg=colour, bold=True)} {clean(rest)}{mark}")


def print_error(error: GpuschedError, *, hint: str | None) -> None:
    """The error on stderr: ``error: ...`` and perhaps ``hint: ...``; after --json one JSON object instead."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(JSON):
        wire = to_wire(error)
        if hint is not None:
            wire["details"] = {**wire["details"], "hint": hint}
        click.echo(json.dumps(wire, ensure_ascii=False, default=str), err=True)
        return
    _print_problem("error:", error.message, "red")
    if hint is not None:
        _print_problem("hint:", hint, "cyan")


def print_usage_error(error: click.ClickException) -> None:
    """A mistake in the command line itself, with the usage of the command."""
    context = getattr(error, "ctx", None)
    if context is not None:
        click.echo(context.get_usage(), err=True)
    _print_problem("error:", error.format_message(), "red")
    if context is not None:
        _print_problem("hint:", f"`{context.command_path} --help` tells more", "cyan")


def _print_problem(label: str, text: str, colour: str) -> None:
    lines = "\n".join(clean(line) for line in text.splitlines())
    click.echo(f"{style(label, fg=colour, bold=True)} {lines}", err=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Shows ``text`` and the seconds gone by on stderr while the body runs, if it is a terminal and takes long."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_show_progress, args=(text, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_progress(text: str, done: threading.Event) -> None:
    if done.wait(_PROGRESS_AFTER_S):
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(clean(text), total=None)
        done.wait()
