"""Seconds for a step of an RLHF loop whose models take turns on one GPU, by each way of taking turns.

    python benchmarks/rlhf_loop.py [--sizes 4,2,2] [--steps 4] [--ways gpusched,to_cpu,resident]
                                   [--out DIR] [--rehearse]

A step: the policy generates; reward and reference score; the policy is updated. Every way runs the same loop over the
same models in Ray, one after the other on a GPU that is empty otherwise:

    gpusched   models made with ``freezable``, moved by ``Phases``: one swap before scoring, one before the update
    to_cpu     plain actors; those that go off call ``.to("cpu")`` and give the memory back, then others ``.to("cuda")``
    resident   plain actors that stay on the GPU, where all of them fit

Sizes are the weights of policy, reward and reference in GB. Needs PyTorch. Each model's contents are digested before
and after. ``--rehearse``: every step without PyTorch, on simulated GPUs, with small sizes; no figure to keep.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray

import machine
from gpusched.client import GpuSched
from gpusched.demo import private_daemon
from ray_integration import Phases, freezable
from ray_integration.demo import vram

ROLES: Final = ("policy", "reward", "reference")
PHASES: Final = {"rollout": ROLES[:1], "score": ROLES[1:], "train": ROLES[:1]}
WIDTH: Final = 7168  # a layer of about 100 MB in half precision
BATCH: Final = 512
TIMEOUT_S: Final = 300.0
_REHEARSED: Final = (8 << 20, 4 << 20, 4 << 20)


class TorchWeights:
    """Layers in half precision on the GPU, and passes through them."""

    def __init__(self, size_bytes: int, seed: int) -> None:
        import torch

        self._torch = torch
        count = max(1, size_bytes // (2 * WIDTH * WIDTH))
        generator = torch.Generator(device="cuda").manual_seed(seed)
        layers = [
            torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.float16, generator=generator)
            for _ in range(count)
        ]
        self._module = torch.nn.ParameterList(
            torch.nn.Parameter(layer.div_(WIDTH**0.5), requires_grad=False) for layer in layers
        )

    def work(self, passes: int) -> float:
        x = self._torch.ones(BATCH, WIDTH, device="cuda", dtype=self._torch.float16)
        for _ in range(passes):
            for layer in self._module:
                x = self._torch.nn.functional.normalize(x @ layer) * 8
        return float(x.float().abs().sum().item())

    def off(self) -> None:
        self._module.to("cpu")
        gc.collect()
        self._torch.cuda.empty_cache()

    def on(self) -> None:
        self._module.to("cuda")
        self._torch.cuda.synchronize()

    def digest(self) -> int:
        views = (
            layer.view(self._torch.int16).sum(dtype=self._torch.int64) for layer in self._module
        )
        return sum(int(each.item()) * (number + 1) for number, each in enumerate(views))


class SimulatedWeights:
    """The same without PyTorch, for a rehearsal."""

    def __init__(self, size_bytes: int, seed: int) -> None:
        self._size = size_bytes
        self._memory: Any = vram.allocate(size_bytes)
        self._memory.write(0, seed.to_bytes(8) * 512)

    def work(self, passes: int) -> float:
        return float(passes * zlib.crc32(self._memory.read(0, self._size)))

    def off(self) -> None:
        self._kept = self._memory.read(0, self._size)
        self._memory.free()

    def on(self) -> None:
        self._memory = vram.allocate(self._size)
        self._memory.write(0, self._kept)

    def digest(self) -> int:
        return zlib.crc32(self._memory.read(0, self._size))


class Role:
    def __init__(self, size_bytes: int, seed: int, sim_dir: str | None) -> None:
        if sim_dir is not None:  # a plain actor has not the host's environment
            os.environ["GPUSCHED_SIM_DIR"] = sim_dir
        self._weights: Any = (TorchWeights if sim_dir is None else SimulatedWeights)(
            size_bytes, seed
        )

    def work(self, passes: int) -> float:
        return float(self._weights.work(passes))

    def off(self) -> None:
        self._weights.off()

    def on(self) -> None:
        self._weights.on()

    def digest(self) -> int:
        return int(self._weights.digest())


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=TIMEOUT_S)


class Hosted:
    """``gpusched``."""

    def __init__(self, options: argparse.Namespace) -> None:
        cls = freezable(start_frozen=True, num_cpus=0)(Role)
        self.models: dict[str, Any] = {}
        for seed, role in enumerate(ROLES):  # one after the other: they need not fit together
            self.models[role] = cls.remote(options.bytes[seed], seed + 1, options.sim_dir)
            get(self.models[role].__ray_ready__.remote())
        self._phases = Phases(
            {phase: [self.models[role] for role in roles] for phase, roles in PHASES.items()}
        )

    def enter(self, phase: str) -> None:
        self._phases.phase(phase)


class ToCpu:
    """``to_cpu``, and with ``moves`` off ``resident``."""

    def __init__(self, options: argparse.Namespace, *, moves: bool = True) -> None:
        cls: Any = ray.remote(num_cpus=0)(Role)
        self._moves = moves
        self._on: set[str] = set() if moves else set(ROLES)
        self.models: dict[str, Any] = {}
        for seed, role in enumerate(ROLES):
            self.models[role] = cls.remote(options.bytes[seed], seed + 1, options.sim_dir)
            get(self.models[role].__ray_ready__.remote())
            if moves:
                get(self.models[role].off.remote())

    def enter(self, phase: str) -> None:
        if not self._moves:
            return
        wanted = set(PHASES[phase])
        get([self.models[role].off.remote() for role in self._on - wanted])
        get([self.models[role].on.remote() for role in wanted - self._on])
        self._on = wanted


def loop(way: Any, steps: int, passes: int) -> dict[str, Any]:
    """Runs the loop; the first step is a warm-up. What it took, and whether the contents stayed what they were."""
    before = digests(way)
    way.enter("rollout")
    taken: dict[str, list[float]] = {"step_s": [], "swap_s": []}
    for number in range(steps + 1):
        begun = time.perf_counter()
        swap_s = 0.0
        for phase, work in (("rollout", 2 * passes), ("score", passes), ("train", passes)):
            entered = time.perf_counter()
            way.enter(phase)
            swap_s += time.perf_counter() - entered
            get([way.models[role].work.remote(work) for role in PHASES[phase]])
        if number:
            taken["step_s"].append(time.perf_counter() - begun)
            taken["swap_s"].append(swap_s)
    return {
        **{name: machine.summary(values) for name, values in taken.items()},
        "swap_share": round(sum(taken["swap_s"]) / sum(taken["step_s"]), 3),
        "contents_right": digests(way) == before,
    }


def digests(way: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for phase in ("score", "rollout"):
        way.enter(phase)
        found |= {role: get(way.models[role].digest.remote()) for role in PHASES[phase]}
    return found


@contextmanager
def cluster(client: GpuSched) -> Iterator[None]:
    """A Ray of its own; what it started has ended with the block."""
    with tempfile.TemporaryDirectory(prefix="gpusched-loop-") as directory:
        here = str(Path(__file__).resolve().parent)
        os.environ["GPUSCHED_SOCKET"] = client.socket_path
        os.environ["GPUSCHED_RAY_DIR"] = directory
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (here, os.environ.get("PYTHONPATH", "")))
        )
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=40,
        )
        try:
            yield
        finally:
            ray.shutdown()
            for process in client.processes():
                client.kill(process["name"], force=True)


def run(options: argparse.Namespace, client: GpuSched, found: dict[str, Any]) -> Iterator[None]:
    """One way after the other into ``found``."""
    for name in options.ways:
        free_mb = client.status()["gpus"][0]["mem_free_mb"]
        if name == "resident" and (sum(options.bytes) >> 20) + 3 * options.spare_mb > free_mb:
            found[name] = {"skipped": f"does not fit: {free_mb} MiB are free"}
            yield
            continue
        with cluster(client):
            way = Hosted(options) if name == "gpusched" else ToCpu(options, moves=name == "to_cpu")
            found[name] = loop(way, options.steps, options.passes)
            del way
        print(f"{name}: {found[name]}", flush=True)
        yield


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="4,2,2", help="policy, reward, reference in GB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--passes", type=int, default=20, help="passes through a model in a phase")
    parser.add_argument("--ways", default="gpusched,to_cpu,resident")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="every step, no figure to keep")
    options = parser.parse_args()
    if options.rehearse and options.out == machine.RESULTS:
        parser.error("a rehearsal is never among the results: name another directory with --out")
    options.ways = options.ways.split(",")
    sizes = [float(each) for each in options.sizes.split(",")]
    options.bytes = _REHEARSED if options.rehearse else [int(each * 1e9) for each in sizes]
    options.spare_mb = 1 if options.rehearse else 1024  # a context, and what the passes need
    options.sim_dir = None
    return options


def main() -> int:
    options = arguments()
    result = machine.new_result("rlhf_loop", rehearsal=options.rehearse)
    name, ways = machine.file_name(result), dict[str, Any]()
    result |= {
        "sizes_bytes": dict(zip(ROLES, options.bytes, strict=True)),
        "steps": options.steps,
        "passes": options.passes,
        "ray": ray.__version__,
        "ways": ways,
    }
    if options.rehearse:
        daemon = private_daemon("sim", "32M")
    else:
        result["ram_touched"] = machine.touch_ram(2 * sum(options.bytes))
        daemon = private_daemon("cuda", None)
    with daemon as client:
        if options.rehearse:
            options.sim_dir = simulated(client)
        for _ in run(options, client, ways):
            machine.save(name, result, options.out)  # a machine may be lent for a time only
    path = machine.save(name, result, options.out)
    print(f"saved as {machine.short(path)}")
    return 0 if all(each.get("contents_right", True) for each in ways.values()) else 1


def simulated(client: GpuSched) -> str:
    """Where the daemon's simulated GPUs are, as a process that it runs sees it."""
    client.run("look", ["sh", "-c", "echo $GPUSCHED_SIM_DIR"], env={})
    deadline = time.monotonic() + 30
    while not (lines := client.logs("look")["lines"]):
        assert time.monotonic() < deadline, "nothing was printed"
        time.sleep(0.01)
    client.kill("look", force=True)
    return str(lines[0])


if __name__ == "__main__":
    sys.exit(main())
