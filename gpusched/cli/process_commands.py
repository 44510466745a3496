"""Commands that change one process (or two): run, adopt, freeze, thaw, swap, migrate, kill."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from gpusched.cli import params
from gpusched.cli.output import print_json, print_result, progress


def default_name(program: str) -> str:
    """A process's name made from its command: the base name, with what names may not have made into ``-``.

    >>> default_name("/opt/my models/train@v2.sh")
    'train-v2.sh'
    """
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(program).name)
    name = re.sub(r"^[^A-Za-z0-9]+", "", base)[:64]
    if not name:
        raise click.UsageError(f"{program!r} makes no name; give one with --name")
    return name


def caller_directory(given: str | None) -> str:
    """The absolute directory to start in. Symbolic links stay: it is where the caller thinks it is."""
    try:
        return os.path.abspath(given or "")  # noqa: PTH100  # Path.absolute keeps "..", resolve drops links
    except FileNotFoundError:
        raise click.UsageError("the current directory is gone; name one with --dir") from None


@click.command(
    "run",
    cls=params.Command,
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@click.option("-n", "--name", help="Its name from now on.  [default: the command's base name]")
@click.option(
    "-g",
    "--gpu",
    "gpus",
    type=params.GPUS,
    default="0",
    show_default=True,
    metavar="N[,N...]",
    help="GPU to run on, or several: 0,1.",
)
@click.option(
    "-d", "--dir", "directory", metavar="DIR", help="Directory to start in.  [default: here]"
)
@click.option("--evictable", is_flag=True, help="Others may freeze it when they need the GPU.")
@click.option(
    "--no-isolate",
    is_flag=True,
    help="In the host's own namespaces; it cannot be saved to disk then.",
)
@params.json_option
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def run_command(
    name: str | None,
    gpus: list[int],
    directory: str | None,
    evictable: bool,
    no_isolate: bool,
    as_json: bool,
    cmd: tuple[str, ...],
) -> None:
    """Start a command on a GPU.

    It runs under the daemon, as you, with your directory and environment.
    """
    name = name or default_name(cmd[0])
    with progress(f"Starting {name}"):
        result = params.connect().run(
            name,
            list(cmd),
            gpu=gpus[0],
            gpus=gpus if len(gpus) > 1 else None,
            dir=caller_directory(directory),
            evictable=evictable,
            isolate=False if no_isolate else None,
        )
    if as_json:
        print_json(result)
    else:
        print_result("Started", f"{result['name']} (pid={result['pid']})", dict(result))


@click.command("adopt", cls=params.Command)
@click.option("--pid", type=click.IntRange(min=1), required=True, help="The running process.")
@click.option("--name", required=True, help="Its name from now on.")
@click.option("--evictable", is_flag=True, help="Others may freeze it when they need the GPU.")
@click.option(
    "--no-stop", is_flag=True, help="Frozen, its CPU threads go on; only its CUDA calls wait."
)
@params.json_option
def adopt_command(pid: int, name: str, evictable: bool, no_stop: bool, as_json: bool) -> None:
    """Take over a running process.

    Its descendants belong to it, those to come too.
    """
    with progress(f"Adopting {name}"):
        result = params.connect().adopt(pid, name, evictable=evictable, stop=not no_stop)
    if as_json:
        print_json(result)
    else:
        print_result("Adopted", f"{result['name']} (pid={result['pid']})", dict(result))


def print_frozen(result: dict[str, Any]) -> None:
    rest = f"{result['name']} → {result['tier']} ({result['duration_ms']} ms)"
    print_result("Frozen", rest, result, colour="cyan")
    if result.get("context_mb"):
        print_result("Kept", f"{result['context_mb']} MB of context on the GPU", result)
    print_sent_to_disk(result)


def print_thawed(result: dict[str, Any]) -> None:
    rest = f"{result['name']} ← {result['from_tier']} ({result['duration_ms']} ms)"
    print_result("Thawed", rest, result)
    print_sent_to_disk(result)
    print_evicted(result)


def print_sent_to_disk(result: dict[str, Any]) -> None:
    """Who went to disk to make room in host RAM."""
    for name in result.get("to_disk", ()):
        print_result("Hibernated", f"{name} → disk", result, colour="blue")


def print_evicted(result: dict[str, Any]) -> None:
    if result.get("evicted"):
        print_result("Evicted", ", ".join(result["evicted"]), result, colour="yellow")


@click.command("freeze", cls=params.Command)
@params.force_option("Also a leased process, or one that may not survive it.")
@params.keep_context_option
@params.json_option
@click.argument("name", type=params.NAME)
def freeze_command(name: str, force: bool, keep_context: bool, as_json: bool) -> None:
    """Move a process's VRAM to host RAM.

    It is stopped, and the GPU is free afterwards.
    """
    with progress(f"Freezing {name}"):
        result = params.connect().freeze(name, force=force, keep_context=keep_context)
    if as_json:
        print_json(result)
    else:
        print_frozen(dict(result))


@click.command("thaw", cls=params.Command)
@params.evict_option
@params.json_option
@click.argument("name", type=params.NAME)
def thaw_command(name: str, evict: bool, as_json: bool) -> None:
    """Bring a process back onto its GPU, from host RAM or from disk."""
    with progress(f"Thawing {name}"):
        result = params.connect().thaw(name, evict=evict)
    if as_json:
        print_json(result)
    else:
        print_thawed(dict(result))


@click.command("swap", cls=params.Command)
@params.force_option("Also a leased process, or one that may not survive it.")
@params.keep_context_option
@params.json_option
@click.argument("off", type=params.NAMES)
@click.argument("on", type=params.NAMES)
def swap_command(
    off: list[str], on: list[str], force: bool, keep_context: bool, as_json: bool
) -> None:
    """Freeze OFF and thaw ON as one operation.

    If one of them fails, both are as before. Each is a name, or several: a,b.
    """
    with progress(f"Swapping {','.join(off)} for {','.join(on)}"):
        result = params.connect().call(
            "swap", off=off, on=on, force=force or None, keep_context=keep_context or None
        )
    if as_json:
        print_json(result)
        return
    for frozen in result["off"]:
        print_frozen(frozen)
    for thawed in result["on"]:
        print_thawed(thawed)


@click.command("migrate", cls=params.Command)
@click.option(
    "--to",
    "gpus",
    type=params.GPUS,
    required=True,
    metavar="N[,N...]",
    help="GPU to move to, or several: 1,0.",
)
@params.force_option("Also a leased process, or one that may not survive it.")
@params.json_option
@click.argument("name", type=params.NAME)
def migrate_command(name: str, gpus: list[int], force: bool, as_json: bool) -> None:
    """Move a process to other GPUs.

    It is active there afterwards.
    """
    several = gpus if len(gpus) > 1 else None
    with progress(f"Migrating {name}"):
        result = params.connect().migrate(
            name, gpu=None if several else gpus[0], gpus=several, force=force
        )
    if as_json:
        print_json(result)
    else:
        rest = f"{result['name']}: GPU {result['from_gpu']} → GPU {result['to_gpu']}"
        print_result("Migrated", rest, dict(result))


@click.command("kill", cls=params.Command)
@params.force_option("Also a leased process.")
@params.json_option
@click.argument("name", type=params.NAME)
def kill_command(name: str, force: bool, as_json: bool) -> None:
    """End a process and forget it.

    It gets SIGTERM, and SIGKILL after a grace period; a frozen one SIGKILL at once.
    """
    with progress(f"Ending {name}"):
        result = params.connect().kill(name, force=force)
    if as_json:
        print_json(result)
    else:
        print_result("Killed", result["name"], dict(result), colour="red")
