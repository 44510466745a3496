"""``gpusched completion SHELL``: the script that teaches a shell to complete commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from gpusched.cli import params


@click.command("completion", cls=params.Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    bash: eval "$(gpusched completion bash)" in ~/.bashrc; zsh likewise in ~/.zshrc;
    fish: gpusched completion fish > ~/.config/fish/completions/gpusched.fish
    """
    complete = get_completion_class(shell)
    if complete is None:  # a Choice above, so click knows it
        raise click.UsageError(f"no completion for {shell}")
    click.echo(complete(ctx.find_root().command, {}, "gpusched", "_GPUSCHED_COMPLETE").source())
