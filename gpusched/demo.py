"""``make demo``: a private daemon, two workloads that do not fit on one GPU together, swapped several times.

On a real GPU where there is a driver, else on a simulated one; the first and the last line say which. Everything
that it starts ends with it. Exit code 0 only if every content was right after every swap.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from gpusched.client import GpuSched
from gpusched.errors import InsufficientGpuMemory
from gpusched.units import format_size, parse_size

SWAPS: Final = 6
READY_TIMEOUT_S: Final = 60.0
_LINE: Final = re.compile(r"(ready|tick \d+) digest=([0-9a-f]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What fits on this machine. ``ballast`` keeps most of a large GPU busy, so that small models do not fit either."""

    backend: str
    where: str
    model: str
    gpu: str | None = None
    ballast: str | None = None


def plan() -> Plan:
    """Real GPUs where NVML finds one, else simulated."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        free = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        name = str(pynvml.nvmlDeviceGetName(handle))
    except Exception:  # noqa: BLE001 - any failure means that there is no GPU to use
        return Plan(
            backend="sim",
            where="a SIMULATED GPU of 512 MiB (no NVIDIA driver here)",
            model="320M",
            gpu="512M",
        )
    model = parse_size("4G")
    ballast = free - model - model // 2
    return Plan(
        backend="cuda",
        where=f"GPU 0, {name}",
        model="4G",
        ballast=f"{ballast >> 20}M" if ballast > model else None,
    )


def digests(client: GpuSched, name: str) -> list[tuple[str, str]]:
    """(``ready`` or ``tick N``, digest) of every line so far."""
    text = client.call("logs", name=name, lines=-1)["output"]
    return [(m[1], m[2]) for m in map(_LINE.match, text.split("\n")) if m]


def wait_for_lines(client: GpuSched, name: str, count: int) -> list[tuple[str, str]]:
    """Blocks until ``name`` has printed ``count`` lines. Raises TimeoutError with its log."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while len(found := digests(client, name)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} printed too little: {client.logs(name)}")
        time.sleep(0.01)
    return found


def start(client: GpuSched, name: str, vram: str, seed: int) -> float:
    """Starts a workload; returns the seconds until its VRAM was filled and checked: a cold start."""
    begun = time.monotonic()
    command = [sys.executable, "-P", "-m", "gpusched.workload", "--vram", vram, "--seed", str(seed)]
    client.run(name, command)
    wait_for_lines(client, name, 1)
    return time.monotonic() - begun


@contextlib.contextmanager
def private_daemon(backend: str, gpu: str | None, *options: str) -> Iterator[GpuSched]:
    """A daemon of our own in a directory of its own; both end with the block, and so does all that it runs.

    ``options``: of ``gpusched daemon``, more than the necessary ones.
    """
    base = Path(tempfile.mkdtemp(prefix="gpusched-demo-"))
    socket = base / "socket"
    command = [sys.executable, "-P", "-m", "gpusched", "--socket", str(socket), "daemon"]
    command += ["--backend", backend, "--state-dir", str(base / "state")]
    command += ["--log-dir", str(base / "log")] + (["--sim-vram", gpu] if gpu else [])
    command += options
    with (base / "daemon.log").open("wb") as log:
        # A ctrl-C is for us alone: the daemon must be there to end what it runs.
        daemon = subprocess.Popen(
            command, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not socket.exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no daemon:\n{(base / 'daemon.log').read_text()}")
            time.sleep(0.01)
        with GpuSched(str(socket)) as client:
            try:
                yield client
            finally:
                for process in client.processes():
                    client.kill(process["name"], force=True)
        daemon.send_signal(signal.SIGTERM)
        if code := daemon.wait(timeout=30):
            raise RuntimeError(f"the daemon ended with {code}")
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
        shutil.rmtree(base, ignore_errors=True)
        if backend == "sim":
            from gpusched.daemon import sim_directory

            shutil.rmtree(sim_directory(base / "state"), ignore_errors=True)


def show(client: GpuSched, chosen: Plan) -> bool:
    """The demonstration itself; True when every content was right."""
    if chosen.ballast:
        click.echo(
            f"A third process takes {chosen.ballast} of the GPU, so that 4 GiB models make it tight."
        )
        start(client, "ballast", chosen.ballast, seed=3)
    cold = {"policy": start(client, "policy", chosen.model, seed=1)}
    click.echo(f"policy holds {chosen.model} of VRAM after a cold start of {cold['policy']:.2f} s.")
    client.freeze("policy")
    cold["reward"] = start(client, "reward", chosen.model, seed=2)
    click.echo(
        f"reward holds {chosen.model} after a cold start of {cold['reward']:.2f} s; policy is frozen."
    )
    try:
        client.thaw("policy")
    except InsufficientGpuMemory as error:
        click.echo(f"Both at once? Refused: {error}")
    else:
        click.echo("Both fit on this GPU at once; nothing to show.")
        return False
    first = {name: digests(client, name)[0][1] for name in cold}

    click.echo(
        f"\n{'':7} {'off':8} {'on':8} {'freeze':>8} {'thaw':>8} {'swap':>8}  cold start  contents"
    )
    off, on, right = "reward", "policy", True
    for number in range(1, SWAPS + 1):
        seen = len(digests(client, on))
        begun = time.monotonic()
        frozen, thawed = client.swap(off, on)
        took = (time.monotonic() - begun) * 1000
        lines = wait_for_lines(client, on, seen + 2)
        same = all(digest == first[on] for _, digest in lines)
        right &= same
        click.echo(
            f"swap {number:2} {off:8} {on:8} {frozen['duration_ms']:5} ms {thawed['duration_ms']:5} ms "
            f"{took:5.0f} ms  {cold[on] * 1000:7.0f} ms  {'right' if same else 'WRONG'}"
        )
        off, on = on, off
    return right


def main() -> int:
    chosen = plan()
    label = f"gpusched demo on {chosen.where}"
    click.echo(f"{label}: two models of {format_size(parse_size(chosen.model))} take turns.")
    if chosen.backend == "cuda" and os.geteuid() != 0:
        click.echo("Not root: gpusched serves your own processes alone.")
    with private_daemon(chosen.backend, chosen.gpu) as client:
        right = show(client, chosen)
    verdict = "every content was right after every swap" if right else "FAILED, see above"
    click.echo(f"\n{label}: {verdict}; everything that was started has ended.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
