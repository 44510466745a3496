"""A program that runs already, started without gpusched, is adopted, frozen and thawed.

    python examples/adopt_running.py [SIZE]      (SIZE of its VRAM, such as 2G; default 100M)

Needs a running daemon; see examples/README.md.
"""

import subprocess
import sys

from gpusched import GpuSched

SIZE = sys.argv[1] if len(sys.argv) > 1 else "100M"


def main() -> None:
    # Somebody's training run. It knows nothing of gpusched, and its output goes to us, not to a log.
    training = subprocess.Popen(
        [sys.executable, "-m", "gpusched.workload", "--vram", SIZE],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None
    try:
        print("training:", training.stdout.readline().strip())  # ready: its VRAM is filled

        with GpuSched() as gs:
            # From now on it has a name. Its children, if it has any, come with it.
            gs.adopt(training.pid, "training")

            frozen = gs.freeze("training")
            print(f"frozen: {frozen['mem_mb']} MiB moved to host RAM")
            thawed = gs.thaw("training")
            print(f"thawed in {thawed['duration_ms']} ms")
            print("training:", training.stdout.readline().strip())

            # There is no way to give it up but to end it: kill sends SIGTERM, and forgets the name.
            gs.kill("training")
    finally:
        training.terminate()  # nothing happens where it has ended
        training.wait()
        training.stdout.close()
    print("ended")


if __name__ == "__main__":
    main()
