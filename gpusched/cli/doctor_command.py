"""``gpusched doctor``: what this machine has and lacks, with the fix for each lack; and a trial on each GPU.

In a pipe a line for each finding (``STATUS  NAME: FOUND``) and an indented one for its fix; on a terminal a table.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gpusched.cli import output, params
from gpusched.errors import Family

if TYPE_CHECKING:
    from gpusched.doctor.findings import Finding
    from gpusched.doctor.readings import Subject
    from gpusched.selftest import Trial

_STYLE: Final = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_EXIT_FAILED: Final = Family.MECHANISM.value


@click.command("doctor", cls=params.Command)
@click.option(
    "--selftest",
    is_flag=True,
    help="Also freeze and thaw the workload on each GPU, contents verified.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "cuda", "sim"]),
    help="What is to run here; sim needs no GPU.  [default: auto, which means cuda]",
)
@click.option("--allow-old-driver", is_flag=True, default=None, help="Accept drivers 570 to 579.")
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="The daemon's settings."
)
@click.option("--state-dir", metavar="DIR", help="Where the daemon's journal is to be.")
@click.option("--disk-dir", metavar="DIR", help="Where snapshots on disk are to be.")
@click.option("--criu", envvar="GPUSCHED_CRIU", metavar="PATH", help="Try this CRIU before others.")
@params.json_option
@click.pass_context
def doctor_command(
    ctx: click.Context,
    /,
    selftest: bool,
    config: Path | None,
    criu: str | None,
    as_json: bool,
    **overrides: Any,
) -> int:
    """Say what this machine lacks, and how to mend it.

    Changes nothing. Exit code 5 when something fails that the daemon needs; warnings do not count.
    """
    import gpusched
    from gpusched.doctor.examine import examine

    overrides["socket_path"] = ctx.find_root().params["socket"]
    subject = _subject(config, criu, overrides)
    with output.progress("Examining this machine"):
        found = examine(subject)
    sound = all(finding.status != "fail" for finding in found)
    if not as_json:
        _print_findings(found)
    trials, problem = _try(subject, as_json) if selftest and sound else ([], "")
    passed = sound and not problem and all(not trial.error for trial in trials)
    if as_json:
        report: dict[str, Any] = {"ok": passed, "version": gpusched.__version__}
        report["findings"] = [asdict(finding) for finding in found]
        if selftest:
            report["selftest"] = [_trial_json(trial) for trial in trials]
            report["selftest_error"] = problem or ("" if sound else "not run: findings failed")
        output.print_json(report)
    elif problem:
        for line in f"selftest: FAILED: {problem}".splitlines():
            click.echo(output.clean(line))
    elif selftest and not sound:
        click.echo("selftest: not run, since what failed above comes first")
    return 0 if passed else _EXIT_FAILED


def _subject(config: Path | None, criu: str | None, overrides: dict[str, Any]) -> Subject:
    from gpusched.config import load
    from gpusched.doctor.readings import Subject

    settings = load(config, overrides)
    return Subject(
        backend="sim" if settings.backend == "sim" else "cuda",
        allow_old_driver=settings.allow_old_driver,
        socket_path=settings.socket_path,
        state_dir=settings.state_dir,
        disk_dir=settings.disk_dir,
        criu=criu,
    )


# -- findings -------------------------------------------------------------------------------------


def _print_findings(found: Sequence[Finding]) -> None:
    if sys.stdout.isatty():
        _print_table(found)
    else:
        from gpusched.doctor.findings import as_text

        for line in as_text(found).splitlines():
            click.echo(output.clean(line))
    count = {status: sum(finding.status == status for finding in found) for status in _STYLE}
    click.echo(f"{count['ok']} ok, {count['warn']} warnings, {count['fail']} failed")


def _print_table(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        text = Text(output.clean(finding.found))
        if finding.fix:
            text.append(f"\n→ {output.clean(finding.fix)}", style="cyan")
        table.add_row(Text(finding.status, style=_STYLE[finding.status]), finding.name, text)
    Console(highlight=False, markup=False, emoji=False).print(table)


# -- the trial ------------------------------------------------------------------------------------


def _try(subject: Subject, as_json: bool) -> tuple[list[Trial], str]:
    """All trials, printed as they end unless for JSON; and why there are not more."""
    from gpusched import selftest

    trials: list[Trial] = []
    try:
        with contextlib.closing(selftest.run(subject.backend)) as running:
            while (trial := _next(running)) is not None:
                trials.append(trial)
                if not as_json:
                    click.echo(output.clean(_trial_line(trial)))
    except RuntimeError as error:  # no daemon came up; errors of ours are RuntimeErrors too
        return trials, str(error).strip()
    return trials, "" if trials else "there is no GPU"


def _next(running: Iterator[Trial]) -> Trial | None:
    """Its progress has left the terminal before the line of the trial is printed."""
    with output.progress("Freezing and thawing"):
        return next(running, None)


def _trial_line(trial: Trial) -> str:
    mark = " [simulated]" if trial.simulated else ""
    where = f"selftest GPU {trial.gpu} ({trial.name}){mark}"
    if trial.error:
        return f"{where}: FAILED: {trial.error}"
    line = f"{where}: {trial.mem_mb} MiB, {len(trial.thaw_ms)} times right; " + ", ".join(
        (
            _direction("freeze", trial.freeze_gb_s, trial.freeze_ms, trial.ceiling_to_host_gb_s),
            _direction("thaw", trial.thaw_gb_s, trial.thaw_ms, trial.ceiling_to_device_gb_s),
        )
    )
    return f"{line}; {trial.note}" if trial.note else line


def _direction(
    verb: str, rate: float | None, times_ms: Sequence[int], ceiling: float | None
) -> str:
    text = f"{verb} {rate} GB/s ({min(times_ms)}-{max(times_ms)} ms"
    return f"{text}; pinned copy {ceiling} GB/s)" if ceiling is not None else f"{text})"


def _trial_json(trial: Trial) -> dict[str, Any]:
    rates = {"freeze_gb_s": trial.freeze_gb_s, "thaw_gb_s": trial.thaw_gb_s}
    return {**asdict(trial), **rates}
