"""Two models take turns on one GPU: the loop of a trainer with a policy and a reward model.

    python examples/two_models_one_gpu.py [SIZE]      (SIZE of each model's VRAM, such as 50G; default 100M)

The two need not fit on the GPU together. Needs a running daemon; see examples/README.md.
"""

import sys
import time

from gpusched import GpuSched
from gpusched.errors import InsufficientGpuMemory

SIZE = sys.argv[1] if len(sys.argv) > 1 else "100M"
MODEL = [sys.executable, "-m", "gpusched.workload", "--vram", SIZE]
STEPS = 3


def use(gs: GpuSched, name: str) -> str:
    """Stands in for a request to the model: waits for the next line that it prints."""
    with gs.follow_logs(name, lines=1) as lines:
        next(lines)
        return next(lines)


def main() -> None:
    with GpuSched() as gs:
        try:
            # Load both, one after the other: the first makes room before the second starts.
            gs.run("policy", MODEL)
            gs.wait_ready("policy", poll=0.1)
            gs.freeze("policy")
            gs.run("reward", MODEL)
            gs.wait_ready("reward", poll=0.1)

            for step in range(1, STEPS + 1):
                begun = time.monotonic()
                # One operation: if policy cannot come, reward stays where it is.
                gs.swap(off="reward", on="policy")
                print(f"step {step}: policy   {use(gs, 'policy')}")
                gs.swap(off="policy", on="reward")
                print(f"step {step}: reward   {use(gs, 'reward')}")
                print(f"step {step}: took {time.monotonic() - begun:.2f} s")

            # A thaw that would not fit is refused before anything is touched, with the numbers.
            try:
                gs.thaw("policy")
                print("both fit on this GPU")
            except InsufficientGpuMemory as error:
                print(f"refused: {error}")
        finally:
            for process in gs.processes():
                if process["name"] in ("policy", "reward"):
                    gs.kill(process["name"])


if __name__ == "__main__":
    main()
