"""The program of ``make demo``: ``python -m ray_integration.demo [--steps N] [--plot PATH]``.

Exit code 0 only if every content was right after every swap and the mean reward rose.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gpusched.client import GpuSched
from gpusched.demo import plan, private_daemon, start
from gpusched.units import MIB, format_size
from ray_integration import freezable
from ray_integration.demo import models, plot
from ray_integration.demo.loop import CALL_TIMEOUT_S, ROLES, Loop, Step

#: By how much the mean reward must have risen.
_LEARNT: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where the loop runs, and how much VRAM each role takes: together more than the GPU has."""

    backend: str
    where: str
    gpu: str | None
    vram: dict[str, int]
    room: int
    ballast_mib: int = 0


def setting() -> Setting:
    """A real GPU where NVML finds one, else a simulated one; a third process takes most of a large GPU."""
    found = plan()
    if found.backend == "sim":
        sizes = dict(zip(ROLES, (150 * MIB, 90 * MIB, 90 * MIB), strict=True))
        where = "a SIMULATED GPU of 256 MiB (no NVIDIA driver here)"
        return Setting(backend="sim", where=where, gpu="256M", vram=sizes, room=256 * MIB)
    # Small enough for a dozen steps in a minute by the driver's own copy. Each process has a context beside it, of some
    # half GiB; so has the ballast.
    sizes = dict(zip(ROLES, (1920 * MIB, 896 * MIB, 896 * MIB), strict=True))
    room = 3584 * MIB
    with_ballast = int(found.ballast[:-1]) + 2048 if found.ballast else 0
    return Setting(
        backend="cuda",
        where=found.where,
        gpu=None,
        vram=sizes,
        room=room,
        ballast_mib=max(0, with_ballast),
    )


def make_models(vram: dict[str, int]) -> dict[str, Any]:
    """One after the other, each frozen as soon as it is made: they do not fit together."""
    classes = (models.Policy, models.Reward, models.Reference)
    made: dict[str, Any] = {}
    for role, cls in zip(ROLES, classes, strict=True):
        actor = freezable(start_frozen=True, num_cpus=0)(cls)
        made[role] = actor.options(name=role).remote(vram[role])
        ray.get(made[role].__ray_ready__.remote(), timeout=CALL_TIMEOUT_S)
    return made


def show(console: Console, loop: Loop, count: int) -> list[Step]:
    """Runs the loop under a progress bar, with a line for each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    done = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=count)
        for step in loop.steps(count):
            bar = "#" * round(step.reward * 30)
            progress.console.print(
                f"step {step.number:2}  reward {step.reward:.3f} {bar:30}  "
                f"swaps {step.swap_s * 1000:5.0f} ms of {step.took_s * 1000:5.0f} ms  "
                f"{'contents right' if step.contents_right else 'contents WRONG'}",
                highlight=False,
            )
            progress.advance(task)
            done.append(step)
    return done


def run(say: Callable[[str], None], console: Console, chosen: Setting, options: Any) -> bool:
    """The demonstration itself, with a daemon and Ray there; True when it showed what it says."""
    roles = ", ".join(f"{role} {format_size(size)}" for role, size in chosen.vram.items())
    say(f"{roles}: together more than the {format_size(chosen.room)} that there are.")
    loop = Loop(make_models(chosen.vram))
    steps = show(console, loop, options.steps)
    gain = steps[-1].reward - steps[0].reward
    share = sum(step.swap_s for step in steps) / sum(step.took_s for step in steps)
    swap_ms = statistics.median(loop.history.swaps_s[1:]) * 1000
    say(
        f"\nMean reward {steps[0].reward:.3f} -> {steps[-1].reward:.3f}; "
        f"a swap takes {swap_ms:.0f} ms (median), {share:.0%} of the time."
    )
    title = f"gpusched: an RLHF loop on {chosen.where}"
    if plot.draw(options.plot, loop.history.held, loop.history.rewards, title):
        say(f"Who held the GPU when: {options.plot}")
    else:
        say("No plot: matplotlib is not installed.")
    return gain > _LEARNT and all(step.contents_right for step in steps)


def with_ray(client: GpuSched, chosen: Setting, act: Callable[[], bool]) -> bool:
    """Runs ``act`` in a Ray of its own on this machine, which ends with it."""
    if chosen.ballast_mib:
        start(client, "ballast", f"{chosen.ballast_mib}M", seed=3)
    with tempfile.TemporaryDirectory(prefix="gpusched-demo-ray-") as directory:
        os.environ["GPUSCHED_SOCKET"] = client.socket_path
        os.environ["GPUSCHED_RAY_DIR"] = directory
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=40,
        )
        try:
            return act()
        finally:
            ray.shutdown()
            for process in client.processes():
                client.kill(process["name"], force=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps of the loop (default 12)")
    parser.add_argument(
        "--plot", type=Path, default=Path("demo.png"), help="where the picture goes"
    )
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    chosen = setting()
    label = f"gpusched demo on {chosen.where}"
    console.print(f"{label}: an RLHF loop in Ray whose three models take turns.", highlight=False)

    def say(text: str) -> None:
        console.print(text, highlight=False)

    with private_daemon(chosen.backend, chosen.gpu) as client:
        right = with_ray(client, chosen, lambda: run(say, console, chosen, options))
    verdict = (
        "it learnt, and every content was right after every swap" if right else "FAILED, see above"
    )
    say(f"{label}: {verdict}; everything that was started has ended.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
