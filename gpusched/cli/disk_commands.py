"""Commands of the disk tier: hibernate, fork, snapshots."""

from __future__ import annotations

from typing import Any

import click

from gpusched import errors
from gpusched.cli import output, params
from gpusched.cli.output import print_json, print_result, progress

_SAVABLE = ("active", "frozen")


def print_hibernated(result: dict[str, Any]) -> None:
    print_result("Hibernated", f"{result['name']} → disk", result, colour="blue")


@click.command("hibernate", cls=params.Command)
@click.option("--all", "every", is_flag=True, help="All that can be, as before a reboot.")
@params.force_option("Also a leased process, or one that may not survive it.")
@params.json_option
@click.argument("name", type=params.NAME, required=False)
def hibernate_command(name: str | None, every: bool, force: bool, as_json: bool) -> int:
    """Move a process to disk.

    It gives up its VRAM and its host RAM, and survives a restart of the daemon and a reboot. `thaw` brings it back.
    """
    if (name is None) is not every:
        raise click.UsageError("Name one process, or say --all.")
    client = params.connect()
    if name is not None:
        with progress(f"Hibernating {name}"):
            result = client.hibernate(name, force=force)
        _show(dict(result), as_json)
        return 0
    failed = 0
    for process in client.processes():
        if process["state"] in _SAVABLE:
            failed |= _hibernate_one(client, str(process["name"]), force, as_json)
    return failed


def _hibernate_one(client: Any, name: str, force: bool, as_json: bool) -> int:
    """One of several: its failure is told and the others go on. The exit code of the whole."""
    try:
        with progress(f"Hibernating {name}"):
            result = client.hibernate(name, force=force)
    except errors.GpuschedError as error:
        output.print_error(error, hint=None)
        return error.family.value
    _show(dict(result), as_json)
    return 0


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        print_hibernated(result)


@click.command("fork", cls=params.Command)
@click.option(
    "-c",
    "--copies",
    type=click.IntRange(1, 256),
    default=2,
    show_default=True,
    metavar="N",
    help="How many.",
)
@click.option(
    "--gpus",
    type=params.GPUS,
    metavar="N[,N...]",
    help="GPUs for the copies, by turns.  [default: where the original is]",
)
@params.force_option("Also a leased process, or one with files open that copies would share.")
@params.json_option
@click.argument("name", type=params.NAME)
def fork_command(
    name: str, copies: int, gpus: list[int] | None, force: bool, as_json: bool
) -> None:
    """Make running copies of a process.

    They are named NAME-1, NAME-2 and so on, each with its own log. The original goes on as it was. A copy has a network
    of its own: it reaches nothing by TCP or UDP but itself.
    """
    with progress(f"Forking {name}"):
        result = params.connect().fork(name, copies, gpus, force=force)
    if as_json:
        print_json(result)
        return
    listed = ", ".join(result["copies"])
    rest = f"{result['source']} → {len(result['copies'])} copies: {listed}"
    print_result("Forked", rest, dict(result))
    click.echo(output.style(result["note"], dim=True))


@click.command("snapshots", cls=params.Command)
@params.json_option
@click.argument("action", type=click.Choice(["list", "verify", "delete"]), default="list")
@click.argument("name", type=params.NAME, required=False)
def snapshots_command(action: str, name: str | None, as_json: bool) -> None:
    """List, verify or delete snapshots on disk.

    Without more, it lists them. `verify NAME` reads all of one and compares it with its checksums. `delete NAME`
    removes one that its process does not need any more; what is only on disk is given up by `gpusched kill NAME`.
    """
    client = params.connect()
    if action == "list":
        if name is not None:
            raise click.UsageError("list takes no NAME.")
        _list(client.snapshots()["snapshots"], as_json)
        return
    if name is None:
        raise click.UsageError(f"{action} needs a NAME.")
    call = client.verify_snapshot if action == "verify" else client.delete_snapshot
    with progress(f"{'Verifying' if action == 'verify' else 'Deleting'} the snapshot of {name}"):
        result = call(name)
    if as_json:
        print_json(result)
    else:
        verb = "Verified" if action == "verify" else "Deleted"
        print_result(verb, f"{result['name']} ({result['size_mb']} MiB)", dict(result))


def _list(found: list[Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    output.print_columns(
        ("NAME", "STATE", "SIZE(MiB)", "VRAM(MiB)", "AGE", "USER", "IMAGE"),
        [
            (s["name"], s["state"], s["size_mb"], s["mem_mb"], s["age"], s["user"], s["image"])
            for s in found
        ],
    )
