"""What commands share: parameter types, options, and the connection to the daemon.

Types refuse bad text as a usage error (exit code 2) before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from gpusched import units
from gpusched.client import GpuSched

_F = TypeVar("_F", bound=Callable[..., Any])

#: Key in ``Context.meta``: whether --json was given, for whoever prints an error.
JSON: Final = "gpusched.json"

#: A shell must not hang on TAB, so names are completed only from a daemon that answers at once.
_COMPLETION_TIMEOUT_S: Final = 0.3


def connect(ctx: click.Context | None = None, *, timeout_s: float | None = None) -> GpuSched:
    """The SDK for the socket that -s/--socket or GPUSCHED_SOCKET names. Opens no connection yet."""
    path = (ctx or click.get_current_context()).find_root().params.get("socket")
    return GpuSched(path) if timeout_s is None else GpuSched(path, timeout_s=timeout_s)


class _ParamType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """Base of ours."""


class ProcessName(_ParamType):
    """The name of a managed process, completed from the running daemon."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # With `a,b` only the last name is being written.
        done, comma, start = incomplete.rpartition(",")
        try:
            processes = connect(ctx, timeout_s=_COMPLETION_TIMEOUT_S).status()["processes"]
        except Exception:  # noqa: BLE001  # nothing may be printed into a line that someone is typing
            return []
        return [
            CompletionItem(f"{done}{comma}{process['name']}", help=process["state"])
            for process in processes
            if process["name"].startswith(start)
        ]


class ProcessNames(ProcessName):
    """One name, or several with commas between them."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        names = str(value).split(",")
        if not all(names):
            self.fail(f"{value!r} has an empty name; write for instance policy or a,b", param, ctx)
        return names


class Size(_ParamType):
    """``80G`` -> bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return units.parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Duration(_ParamType):
    """``10m`` -> seconds, above zero."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            seconds = units.parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds <= 0:
            self.fail(f"{value!r} is no time at all; write for instance 30s or 10m", param, ctx)
        return seconds


class Gpus(_ParamType):
    """``0`` or ``0,1`` -> GPU numbers, each once."""

    name = "gpus"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        parts = str(value).split(",")
        # isascii: int() would also read digits of other scripts.
        if not all(part.isascii() and part.isdigit() for part in parts):
            self.fail(f"{value!r} is not a GPU number; write for instance 0 or 0,1", param, ctx)
        gpus = [int(part) for part in parts]
        if len(set(gpus)) != len(gpus):
            self.fail(f"{value!r} names a GPU twice", param, ctx)
        return gpus


NAME: Final = ProcessName()
NAMES: Final = ProcessNames()
SIZE: Final = Size()
DURATION: Final = Duration()
GPUS: Final = Gpus()


def _set_socket(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.find_root().params["socket"] = value


class Command(click.Command):
    """A command that takes the global -s/--socket also behind its name, where existing scripts write it."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        names = ["-s", "--socket"]
        socket = click.Option(names, hidden=True, expose_value=False, callback=_set_socket)
        return [*super().get_params(ctx), socket]


def _remember_json(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


def json_option(command: _F) -> _F:
    """``--json``: the result for machines, one JSON value a line; errors too, on stderr."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=_remember_json,
        help="Print JSON.",
    )(command)


def force_option(text: str) -> Callable[[_F], _F]:
    return click.option("--force", is_flag=True, help=text)


def keep_context_option(command: _F) -> _F:
    return click.option(
        "--keep-context",
        is_flag=True,
        help="Leave the CUDA context on the GPU until somebody needs the room: faster both ways.",
    )(command)


def evict_option(command: _F) -> _F:
    return click.option(
        "--evict", is_flag=True, help="If VRAM is short, freeze evictable processes on that GPU."
    )(command)
