"""Attached mode: actors that somebody else wrote take turns on a GPU, with nothing changed in them.

Needs a gpusched daemon and ray, with PyTorch on a real GPU. Simulated: with GPUSCHED_SIM_DIR as in examples/README.md.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from ray_integration import attach, freeze, status, swap

SIZE = 150 << 20  # two do not fit on a GPU of 256 MiB


class Trainer:
    """As a framework has them: a plain actor, with a method for each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.memory: Any = None

    def load(self) -> None:
        if os.environ.get("GPUSCHED_SIM_DIR"):
            from gpusched.mechanisms.sim import device

            self.memory = device.init().allocate(SIZE)
        else:
            import torch

            self.memory = torch.ones(SIZE, dtype=torch.uint8, device="cuda")

    def step(self) -> float:
        """Uses the GPU: on a frozen actor it waits for the thaw."""
        if os.environ.get("GPUSCHED_SIM_DIR"):
            self.memory.read(0, 4096)
        else:
            self.memory.sum().item()
        self.losses.append(1.0 / (1 + len(self.losses)))
        return self.losses[-1]

    def history(self) -> list[float]:
        """Does not use the GPU: a frozen actor answers."""
        return self.losses


def main() -> None:
    ray.init(address="local", num_gpus=1, log_to_driver=False, include_dashboard=False)
    plain: Any = ray.remote(num_gpus=0.5)(Trainer)
    actor, critic = plain.remote(), plain.remote()
    ray.get(attach([actor, critic]))

    ray.get(actor.load.remote())
    ray.get(actor.step.remote())
    under_way = actor.step.remote()
    gone = ray.get(freeze(actor))  # once the call under way has ended
    print(f"frozen: {gone['mem_mb']} MiB are in {gone['tier']}; loss {ray.get(under_way)}")
    print(f"it answers: {ray.get(actor.history.remote())}")

    ray.get(critic.load.remote())  # there is room now
    print(f"critic: loss {ray.get(critic.step.remote())}")
    waiting = actor.step.remote()
    ray.get(swap(critic, actor))
    print(f"after the swap the waiting step goes on: loss {ray.get(waiting):.3f}")
    print(f"states: {[each['state'] for each in ray.get(status([actor, critic]))]}")


if __name__ == "__main__":
    main()
    ray.shutdown()
