"""The program ``gpusched``: its table of commands, and how errors become messages and exit codes.

Does not cover: what a command does (the modules named in ``COMMANDS``, imported when called: ``gpusched status``
must answer at once) or how results are printed (``output.py``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import click

from gpusched.cli import output
from gpusched.errors import GpuschedError

#: Command -> the module that has it, in the order that ``--help`` lists them. The function is ``NAME_command``.
COMMANDS: Final[dict[str, str]] = {
    "status": "status_command",
    "run": "process_commands",
    "adopt": "process_commands",
    "freeze": "process_commands",
    "thaw": "process_commands",
    "swap": "process_commands",
    "migrate": "process_commands",
    "hibernate": "disk_commands",
    "fork": "disk_commands",
    "kill": "process_commands",
    "acquire": "lease_commands",
    "release": "lease_commands",
    "wait": "watch_commands",
    "logs": "watch_commands",
    "events": "watch_commands",
    "snapshots": "disk_commands",
    "daemon": "node_commands",
    "doctor": "doctor_command",
    "rescue": "node_commands",
    "completion": "completion",
}

#: Error code -> the option that helps, where the command has it, and what it does.
_HINTS: Final = {
    "lease_held": ("force", "does it all the same"),
    "insufficient_gpu_memory": ("evict", "freezes evictable processes on that GPU first"),
    "already_exists": ("name", "gives another name; `gpusched kill` frees the old one"),
}

EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141


class Program(click.Group):
    """A group that imports a command's module when it is called, and the one place that ends the program."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"gpusched.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def invoke(self, ctx: click.Context) -> int:
        """Runs the command; the result is the exit code. Errors of ours end here, as messages."""
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except GpuschedError as error:
            output.print_error(error, hint=self._hint(ctx, error))
            return error.family.value
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # ends the line that shows ^C
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # Whoever read our output has gone, as in `| head`: end quietly, also in Python's last flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        return code or 0

    def main(  # type: ignore[override]  # never returns in standalone mode, like the original
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> int:
        output.never_fail_on_characters()
        try:
            code: int = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            output.print_usage_error(error)
            code = error.exit_code
        if standalone_mode:
            sys.exit(code)
        return code

    def _hint(self, ctx: click.Context, error: GpuschedError) -> str | None:
        """What to do about ``error``: what the daemon suggests, else the option that the command has for it."""
        if "hint" in error.details:
            return str(error.details["hint"])
        option, text = _HINTS.get(error.code, ("", ""))
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        known = {param.name for param in command.params} if command else set()
        # The daemon's own text often names the option already.
        fits = option in known and f"--{option}" not in error.message
        return f"--{option} {text}" if fits else None


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from gpusched import __version__

        click.echo(f"gpusched {__version__}")
        ctx.exit()


@click.group(
    "gpusched",
    cls=Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "-s",
    "--socket",
    metavar="PATH",
    help="The daemon's socket.  [default: $GPUSCHED_SOCKET or /tmp/gpusched.sock]",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.pass_context
def program(ctx: click.Context, socket: str | None) -> None:
    """Freeze GPU processes to host RAM and thaw them: several models share a GPU by turns."""
    del socket  # commands look it up: see params.connect
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """The console script. Ends the program."""
    program(prog_name="gpusched")
