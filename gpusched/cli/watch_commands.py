"""Commands that look on: wait, logs, events."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any, Final

import click

from gpusched import errors
from gpusched.cli import output, params
from gpusched.client import GpuSched

#: How often ``wait`` looks; a status costs the daemon well under a millisecond.
_POLL_S: Final = 0.1
#: As long as the SDK waits. Without --exit a name that nobody starts would be waited for without end.
READY_TIMEOUT_S: Final = 120.0


@click.command("wait", cls=params.Command)
@click.option(
    "--exit", "until_exit", is_flag=True, help="Until it ends; then exit with its exit code."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=params.DURATION,
    help="Such as 5m.  [default: 2m; with --exit none]",
)
@params.json_option
@click.argument("name", type=params.NAME)
def wait_command(name: str, until_exit: bool, timeout_s: float | None, as_json: bool) -> int:
    """Wait until a process is ready, or has ended.

    Ready means that it holds VRAM. A name that is not there yet is waited for, except with --exit.
    """
    client = params.connect()
    if until_exit:
        with output.progress(f"Waiting for {name} to end"):
            process = _wait_exit(client, name, float("inf") if timeout_s is None else timeout_s)
        if as_json:
            output.print_json(process)
        return _exit_code(process)
    with output.progress(f"Waiting for {name} to be ready"):
        process = _wait_ready(client, name, READY_TIMEOUT_S if timeout_s is None else timeout_s)
    if as_json:
        output.print_json(process)
    else:
        output.print_result("Ready", f"{name} ({process['mem_mb']} MiB)", {})
    return 0


def _wait_ready(client: GpuSched, name: str, limit_s: float) -> dict[str, Any]:
    try:
        return dict(client.wait_ready(name, timeout=limit_s, poll=_POLL_S))
    except TimeoutError as error:
        raise errors.DeadlineExceeded(str(error)) from error


def _find(client: GpuSched, name: str) -> dict[str, Any]:
    for process in client.status()["processes"]:
        if process["name"] == name:
            return dict(process)
    raise errors.NotFound(f"no process named {name!r}")


def _wait_exit(client: GpuSched, name: str, limit_s: float) -> dict[str, Any]:
    """The status of ``name`` once it is dead. Raises NotFound, DeadlineExceeded, ProcessExited (it was forgotten)."""
    deadline = time.monotonic() + limit_s
    process = _find(client, name)
    while process["state"] != "dead":
        if time.monotonic() >= deadline:
            raise errors.DeadlineExceeded(
                f"{name} still runs after {limit_s:g} s (state {process['state']})"
            )
        time.sleep(_POLL_S)
        pid = process["pid"]
        try:
            process = _find(client, name)
        except errors.NotFound as error:
            raise errors.ProcessExited(f"{name} was killed and forgotten") from error
        if process["pid"] != pid:
            raise errors.ProcessExited(f"{name} ended and the name was given to another process")
    return process


def _exit_code(process: dict[str, Any]) -> int:
    """The exit code as a shell would have it. Raises ProcessExited when nobody saw how it ended."""
    if process.get("exit_code") is not None:
        return int(process["exit_code"])
    if process.get("exit_signal") is not None:
        return 128 + int(process["exit_signal"])
    raise errors.ProcessExited(f"{process['name']} has ended; its exit code is not known")


@click.command("logs", cls=params.Command)
@click.option("-n", "--lines", default=50, show_default=True, help="How many; negative: all.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what it writes from now on.")
@params.json_option
@click.argument("name", type=params.NAME)
def logs_command(name: str, lines: int, follow: bool, as_json: bool) -> None:
    """Show the last lines that a process wrote."""
    client = params.connect()
    if not follow:
        result = client.logs(name, lines)
        if as_json:
            output.print_json(result)
            return
        # Not click.echo: a log keeps its colours in a pipe too, for instance into `less -R`.
        for line in result["lines"]:
            print(line)
        return
    for line in client.follow_logs(name, lines):
        if as_json:
            output.print_json_line({"line": line})
        else:
            print(line, flush=True)


@click.command("events", cls=params.Command)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@params.json_option
def events_command(follow: bool, as_json: bool) -> None:
    """Show the last 20 events.

    Time, type, process, duration, detail; with --json one object a line.
    """
    client = params.connect()
    if not follow:
        for event in client.status()["recent_events"]:
            _print_event(dict(event), as_json)
        return
    with client.events() as stream:
        for event in chain(stream.first["recent_events"], stream):
            _print_event(dict(event), as_json)
    raise errors.DaemonUnavailable("the daemon has closed the connection")


def _print_event(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json_line(event)
        return
    duration = f"{event['duration_ms']} ms" if "duration_ms" in event else "-"
    fields = (
        f"{event['time']:<24}",
        f"{event['type']:<10}",
        f"{event.get('process') or '-':<16}",
        f"{duration:>9}",
        event.get("detail") or "-",
    )
    print(output.clean("  ".join(fields)), flush=True)
