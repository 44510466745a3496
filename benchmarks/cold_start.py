"""A model's cold start beside freezing and thawing it: what a swap saves.

    python benchmarks/cold_start.py [--models Qwen2.5-0.5B,Qwen2.5-1.5B] [--runs 3] [--directory DIR] [--out DIR]

For each model, of the published configuration and with random weights: the time from the start of a process to its
first token, the weights coming from a local file in bf16 (``model_server.py``; the file is in the page cache, which is
the cold start's best case); then freeze, thaw, and the first token after the thaw, of that same process. After every
thaw the token must be the same as before, and so must a digest of all weights in VRAM. The models are built once, into
a directory of their own that goes again, or into ``--directory``, where they stay and are used again. Host RAM is
touched once before, and the process goes once through a freeze and thaw that do not count. Needs PyTorch and
transformers. Saved after every step. ``--rehearse`` tries it out with a tiny model on the CPU, says so in every line,
and is never among the results.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from gpusched.client import GpuSched
from gpusched.demo import private_daemon
from model_server import MODELS

SERVER = Path(__file__).resolve().parent / "model_server.py"
READY_LIMIT_S = 180.0
ANSWER_LIMIT_S = 60.0
TOUCH_BYTES = 14 << 30


class Served:
    """One model server under the daemon, from its start on."""

    def __init__(self, client: GpuSched, name: str, command: list[str], address: Path) -> None:
        self.client, self.name, self.address = client, name, address
        client.run(name, [*command, "--socket", str(address)])
        self.ready = self._wait()

    def _wait(self) -> dict[str, Any]:
        """What it says of its own start. Raises SystemExit with its log where it ends or takes too long."""
        deadline = time.monotonic() + READY_LIMIT_S
        lines: list[str] = []
        while time.monotonic() < deadline:
            lines = self.client.logs(self.name, lines=-1)["lines"]
            for line in lines:
                if line.startswith("ready "):
                    found: dict[str, Any] = json.loads(line.removeprefix("ready "))
                    return found
            (process,) = [p for p in self.client.processes() if p["name"] == self.name]
            if process["state"] != "active":
                break
            time.sleep(0.02)
        raise SystemExit("\n".join([f"{self.name} did not get ready:", *lines[-20:]]))

    def ask(self, request: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
            connection.settimeout(ANSWER_LIMIT_S)
            connection.connect(str(self.address))
            lines.write(request + "\n")
            lines.flush()
            return lines.readline().strip()

    def kill(self) -> None:
        self.client.kill(self.name)
        self.address.unlink()


class Session:
    """The result as it grows: saved after every step."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.result = machine.new_result("cold_start", rehearsal=options.rehearse)
        self.result |= {"models": [], "file_system": file_system(directory)}
        self.out, self.rehearsal = options.out, options.rehearse
        self.name = machine.file_name(self.result)

    def note(self, row: dict[str, Any], **figures: float) -> None:
        for key, value in figures.items():
            row[key].append(round(value, 1))
        text = "  ".join(f"{key} {value:.0f}" for key, value in figures.items())
        self.say(f"{row['model']}: {text}")
        self.save()

    def say(self, text: str) -> None:
        print(f"{'SIMULATED  ' if self.rehearsal else ''}{text}", flush=True)

    def save(self) -> Path:
        return machine.save(self.name, self.result, self.out)


def new_row(model: str, directory: Path) -> dict[str, Any]:
    files = list(directory.glob("*.safetensors"))
    return {
        "model": model,
        "parameters": MODELS[model].parameters,
        "file_bytes": sum(file.stat().st_size for file in files),
        "cold_start_ms": [],  # from the start of the process to its first token, and its parts
        "import_ms": [],
        "load_ms": [],
        "first_token_ms": [],
        "freeze_ms": [],
        "thaw_ms": [],
        "token_after_thaw_ms": [],
        "token_when_active_ms": [],
        "verified": 0,
    }


def one_model(
    session: Session, client: GpuSched, model: str, directory: Path, options: argparse.Namespace
) -> None:
    row = new_row(model, directory)
    session.result["models"].append(row)
    name = model.lower()
    command = [options.torch_python, str(SERVER), "serve", str(directory)]
    command += ["--device", options.device]
    served, tokens = None, set()
    for _ in range(options.runs):
        if served is not None:
            served.kill()
        # Beside the daemon's socket: short, and gone with the daemon.
        served = Served(client, name, command, Path(client.socket_path).with_name(f"{name}.sock"))
        imported, loaded, first = (
            served.ready[key] for key in ("imported", "loaded", "first_token")
        )
        session.note(
            row,
            cold_start_ms=first,
            import_ms=imported,
            load_ms=loaded - imported,
            first_token_ms=first - loaded,
        )
        tokens.add(served.ready["token"])
    if served is None or len(tokens) != 1:
        raise SystemExit(f"{model}: the cold starts came to different tokens: {tokens}")
    freezes(session, row, served, options.runs)
    served.kill()


def freezes(session: Session, row: dict[str, Any], served: Served, runs: int) -> None:
    client, name = served.client, served.name
    before = (served.ask("token"), served.ask("digest"))
    row["token"], row["digest"] = before
    row["vram_mib"] = client.freeze(name)["mem_mb"]  # the way that does not count
    row["left_mib"] = machine.used_mib() - session.result["idle_mib"]
    client.thaw(name)
    served.ask("token")
    for _ in range(runs):
        times = [time.monotonic()]
        client.freeze(name)
        times.append(time.monotonic())
        client.thaw(name)
        times.append(time.monotonic())
        token = served.ask("token")
        times.append(time.monotonic())
        if (token, served.ask("digest")) != before:
            raise SystemExit(f"{row['model']}: other contents after the thaw")
        row["verified"] += 1
        begun = time.monotonic()
        served.ask("token")
        took = [1000 * (end - start) for start, end in itertools.pairwise(times)]
        session.note(
            row,
            freeze_ms=took[0],
            thaw_ms=took[1],
            token_after_thaw_ms=took[2],
            token_when_active_ms=1000 * (time.monotonic() - begun),
        )


@contextlib.contextmanager
def models_directory(wanted: Path | None) -> Iterator[Path]:
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="gpusched-models-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def build(session: Session, directory: Path, options: argparse.Namespace) -> None:
    """Makes the models that ``directory`` lacks, and reads all of them and all of PyTorch into the page cache."""
    command = [options.torch_python, str(SERVER), "build", str(directory)]
    command += ["--models", ",".join(options.models), "--device", options.device]
    begun = time.monotonic()
    subprocess.run(command, check=True, timeout=300)
    for model in options.models:
        for file in (directory / model).iterdir():
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass
    session.say(f"models built, saved and read in {time.monotonic() - begun:.0f} s")


def file_system(directory: Path) -> str:
    """The type of the file system that the models are read from."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if os.path.commonpath([where, directory]) == where and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


def missing(options: argparse.Namespace) -> str:
    """Why the models cannot be run here; empty when they can, as far as a look tells that imports nothing."""
    ask = (
        "from importlib.util import find_spec\n"
        "print(*(m for m in ('torch', 'transformers', 'safetensors') if not find_spec(m)))"
    )
    asked = subprocess.run(
        [options.torch_python, "-c", ask], capture_output=True, text=True, timeout=60, check=False
    )
    if asked.returncode != 0:
        return (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
    if packages := asked.stdout.split():
        return f"{options.torch_python} has no {', '.join(packages)}"
    return "" if options.rehearse or machine.describe()["gpus"] else "NVML finds no GPU"


def show(session: Session) -> None:
    for row in session.result["models"]:
        cold = statistics.median(row["cold_start_ms"])
        back = statistics.median(
            a + b for a, b in zip(row["thaw_ms"], row["token_after_thaw_ms"], strict=True)
        )
        session.say(
            f"{row['model']}: {row['vram_mib']} MiB of VRAM; cold start {cold:.0f} ms, freeze "
            f"{statistics.median(row['freeze_ms']):.0f} ms, thaw to first token {back:.0f} ms"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(m for m in MODELS if m != "tiny"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="keep the models there")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="an interpreter that has PyTorch"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="simulated; needs --out")
    options = parser.parse_args()
    options.models = ["tiny"] if options.rehearse else options.models.split(",")
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(unknown)}")
    options.device = "cpu" if options.rehearse else "cuda"
    if options.rehearse and options.out is None:
        parser.error("a rehearsal is never among the results: give --out")
    return options


def main() -> int:
    options = parse()
    if why := missing(options):
        print(f"cold_start.py needs PyTorch, transformers and a GPU: {why}", file=sys.stderr)
        return 1
    with models_directory(options.directory) as directory:
        session = Session(options, directory)
        if not options.rehearse:
            session.result["ram_touched"] = machine.touch_ram(TOUCH_BYTES)
        build(session, directory, options)
        session.result["idle_mib"] = machine.used_mib()
        backend, room = ("sim", "1G") if options.rehearse else ("cuda", None)
        with private_daemon(backend, room) as client:
            for model in options.models:
                one_model(session, client, model, directory / model, options)
        show(session)
        session.say(f"saved {machine.short(session.save())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
