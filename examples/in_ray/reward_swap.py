"""A reward model swapped in from a plain Ray script: score what the policy wrote, then give the GPU back.

Needs a gpusched daemon and ray. On simulated GPUs (`gpusched daemon --backend sim --sim-vram 256M`) as on real ones.
"""

from __future__ import annotations

import ray

from ray_integration import freezable, status, swap

SIZE = 150 << 20  # two do not fit on a GPU of 256 MiB


def allocate(size: int) -> object:
    """VRAM: a simulated GPU's where the host has one, else PyTorch's."""
    from os import environ

    if environ.get("GPUSCHED_SIM_DIR"):
        from gpusched.mechanisms.sim import device

        return device.init().allocate(size)
    import torch

    return torch.ones(size, dtype=torch.uint8, device="cuda")


class Policy:
    def __init__(self) -> None:
        self.memory = allocate(SIZE)
        self.written = 0

    def write(self, prompts: list[str]) -> list[str]:
        self.written += len(prompts)
        return [f"{prompt}, and so on" for prompt in prompts]


class Reward:
    def __init__(self) -> None:
        self.memory = allocate(SIZE)

    def score(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


def main() -> None:
    ray.init(log_to_driver=False, include_dashboard=False)
    # Made frozen, because the policy is to have the GPU first.
    reward = freezable(start_frozen=True)(Reward).remote()
    ray.get(reward.__ray_ready__.remote())
    policy = freezable(Policy).remote()
    texts = policy.write.remote(["once upon a time", "it was late"])
    ray.wait([texts])

    gone, come = ray.get(swap(policy, reward))
    print(f"swapped: {gone['mem_mb']} MiB off, {come['mem_mb']} MiB on")
    print(f"scores: {ray.get(reward.score.remote(texts))}")

    waiting = policy.write.remote(["again"])  # waits in the proxy: the policy is frozen
    print(f"policy is {ray.get(status(policy))['state']}; its next call waits")
    ray.get(swap(reward, policy))
    print(f"after the swap back: {ray.get(waiting)}")


if __name__ == "__main__":
    main()
    ray.shutdown()
