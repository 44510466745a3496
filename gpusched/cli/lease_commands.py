"""Leases: acquire and release.

A lease without a time ends with the connection that took it, so ``acquire`` stays for as long as the lease is to last:
while CMD runs, or until it is interrupted. ``acquire --for`` leaves at once.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import click

from gpusched import errors
from gpusched.cli import output, params
from gpusched.client import GpuSched
from gpusched.types import Event
from gpusched.units import format_age

EXIT_NOT_FOUND: Final = 127
EXIT_NOT_EXECUTABLE: Final = 126


@click.command("acquire", cls=params.Command)
@click.option("--for", "for_s", type=params.DURATION, help="Such as 10m; then return at once.")
@params.evict_option
@params.json_option
@click.argument("name", type=params.NAME)
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
def acquire_command(
    name: str, for_s: float | None, evict: bool, as_json: bool, cmd: tuple[str, ...]
) -> int:
    """Bring a process onto the GPU and keep it there.

    For a time, while CMD runs, or until interrupted. With CMD the exit code is CMD's.
    """
    if cmd and for_s is not None:
        raise click.UsageError("a lease lasts --for a time or while CMD runs, not both")
    if cmd and as_json:
        raise click.UsageError("--json has no place beside CMD, which owns the output")
    if cmd and shutil.which(cmd[0]) is None:  # found out before anything moves
        click.echo(f"error: {output.clean(cmd[0])}: command not found", err=True)
        return EXIT_NOT_FOUND
    with params.connect() as client:  # whose end also ends the lease
        if cmd:
            _acquire(client, name, for_s, evict)
            return _run_beside(cmd)
        if for_s is not None:
            _print_acquired(_acquire(client, name, for_s, evict), as_json)
            return 0
        with client.events() as events:  # opened first, so that no end goes unseen
            _print_acquired(_acquire(client, name, for_s, evict), as_json)
            raise _what_ended(name, events)


def _acquire(client: GpuSched, name: str, for_s: float | None, evict: bool) -> dict[str, Any]:
    with output.progress(f"Acquiring {name}"):
        return dict(client.acquire(name, for_s=for_s, evict=evict))


def _print_acquired(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json_line(result)
        return
    expires_s = result["expires_s"]
    until = "until interrupted" if expires_s is None else f"for {format_age(expires_s)}"
    rest = f"{result['name']} ← {result['from_tier']} ({result['duration_ms']} ms), {until}"
    output.print_result("Acquired", rest, result)
    sys.stdout.flush()  # a script that waits for this line must see it while we hold the lease


def _what_ended(name: str, events: Iterable[Event]) -> errors.GpuschedError:
    """Blocks until there is nothing left to hold, and says why. Ctrl-C ends it as it ends everything else."""
    for event in events:
        if event.get("process") == name and event["type"] in ("exit", "kill"):
            return errors.ProcessExited(f"{name} has ended, and the lease with it")
    return errors.DaemonUnavailable("the daemon has closed the connection, and the lease has ended")


def _run_beside(cmd: Sequence[str]) -> int:
    """Runs ``cmd`` on our terminal; its exit code as a shell has it."""
    with _signals() as signals:
        try:
            child = subprocess.Popen(cmd)
        except OSError as error:
            click.echo(f"error: {output.clean(cmd[0])}: {error.strerror}", err=True)
            return EXIT_NOT_EXECUTABLE
        signals.forward_to(child)
        code = child.wait()
    return code if code >= 0 else 128 - code


class _Signals:
    """Passes signals on to a child, those too that came before there was one."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        for number in self._early:
            child.send_signal(number)


@contextmanager
def _signals() -> Iterator[_Signals]:
    """While the body runs, signals that would end us are for the child: we stay to give its lease back.

    Ctrl-C reaches it anyway, since it is in the terminal's foreground group with us. Functions, not SIG_IGN or a mask:
    the child would inherit those.
    """
    signals = _Signals()
    before = {n: signal.signal(n, signals.receive) for n in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda _number, _frame: None)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command("release", cls=params.Command)
@params.json_option
@click.argument("name", type=params.NAME)
def release_command(name: str, as_json: bool) -> None:
    """End your leases on a process.

    It stays on the GPU until it is frozen.
    """
    result = params.connect().release(name)
    if as_json:
        output.print_json(result)
    else:
        leases = "1 lease" if result["released"] == 1 else f"{result['released']} leases"
        output.print_result("Released", f"{result['name']} ({leases})", dict(result))
