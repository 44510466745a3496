"""One model on each of two nodes, moved as one: all freezes first, then all thaws, and back whole if one fails.

Run on a Ray cluster with a gpusched daemon on each node: `python two_nodes.py ADDRESS` (default: auto; local: a Ray of
its own). On a single node both models are there, and each move is one operation of its daemon.
"""

from __future__ import annotations

import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_integration import freezable, freeze, group, status, thaw


class Shard:
    """Half of a model. A real one would load its weights here."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.calls = 0

    def before_freeze(self) -> None:
        print(f"rank {self.rank}: communicators go")  # in `gpusched logs`

    def after_thaw(self) -> None:
        print(f"rank {self.rank}: communicators are back")

    def forward(self, x: int) -> int:
        self.calls += 1
        return x * 2 + self.rank


def main(address: str) -> None:
    ray.init(address=None if address == "local" else address, log_to_driver=False)
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])[:2]  # type: ignore[no-untyped-call]
    shards = [
        freezable(Shard)
        .options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[rank % len(nodes)], soft=False)
        )
        .remote(rank)
        for rank in range(2)
    ]
    group("model", shards)
    print("forward:", ray.get([shard.forward.remote(10) for shard in shards]))
    print("frozen:", [each["tier"] for each in ray.get(freeze("model"))])
    waiting = [shard.forward.remote(20) for shard in shards]
    print("states:", [each["state"] for each in ray.get(status("model"))])
    ray.get(thaw("model"))
    print("forward:", ray.get(waiting))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "auto")
    ray.shutdown()
