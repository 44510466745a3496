"""Commands that need no daemon: running one, and rescuing a process from one that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gpusched.cli import output, params


@click.command("daemon", cls=params.Command)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings as TOML.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "cuda", "sim"]),
    help="sim: simulated GPUs. auto means cuda and never falls back to sim.  [default: auto]",
)
@click.option("--sim-gpus", type=click.IntRange(1, 1024), metavar="N", help="[default: 1]")
@click.option("--sim-vram", "sim_vram_bytes", type=params.SIZE, help="Of each.  [default: 8G]")
@click.option("--state-dir", metavar="DIR", help="Journal and records; one daemon for each.")
@click.option("--log-dir", metavar="DIR", help="Output of the processes.")
@click.option("--disk-dir", metavar="DIR", help="Snapshots on disk.")
@click.option(
    "--ram-budget",
    "ram_budget_bytes",
    type=params.SIZE,
    help="Host RAM for snapshots.  [default: 80 % of it]",
)
@click.option(
    "--disk-budget",
    "disk_budget_bytes",
    type=params.SIZE,
    help="Disk for snapshots.  [default: 500G]",
)
@click.option("--group", metavar="NAME", help="Its members may do all that root may.")
@click.option(
    "--allow-old-driver",
    is_flag=True,
    default=None,
    help="Accept drivers 570 to 579; migrate is then not there.",
)
@click.option(
    "--direct/--no-direct",
    default=None,
    help="Move the VRAM of what is run past the driver's own copy.  [default: --direct]",
)
@click.pass_context
def daemon_command(ctx: click.Context, /, config: Path | None, **overrides: Any) -> int:
    """Run the daemon in the foreground.

    Sizes are a number with K, M, G or T (powers of 1024); MiB where no letter stands. Options win over the file.
    """
    from gpusched.config import load
    from gpusched.daemon import main as run_daemon

    overrides["socket_path"] = ctx.find_root().params["socket"]
    return run_daemon(load(config, overrides))


@click.command("rescue", cls=params.Command)
@params.json_option
@click.argument("pid", type=click.IntRange(min=1))
def rescue_command(pid: int, as_json: bool) -> None:
    """Bring a frozen process back without a daemon."""
    from gpusched.rescue import rescue

    with output.progress(f"Rescuing {pid}"):
        report = rescue(pid)
    if as_json:
        output.print_json(report)
        return
    output.print_columns(
        ("PID", "BEFORE", "AFTER"),
        [(p["pid"], p["before"], p["after"]) for p in report["processes"]],
    )
    click.echo(output.clean(report["message"]))
