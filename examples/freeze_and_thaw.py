"""One model: freeze it, see that the GPU is free, thaw it, see that nothing was lost.

    python examples/freeze_and_thaw.py [SIZE]      (SIZE of its VRAM, such as 2G; default 100M)

Needs a running daemon; examples/README.md says how to have one without a GPU.
"""

import sys

from gpusched import GpuSched

# Any command that uses the GPU will do. This one fills its VRAM, and prints a digest of it five times a second.
SIZE = sys.argv[1] if len(sys.argv) > 1 else "100M"
MODEL = [sys.executable, "-m", "gpusched.workload", "--vram", SIZE]


def digest(line: str) -> str:
    """What the model computed from the contents of its VRAM, from one line of its output."""
    return line.split("digest=")[1].split()[0]


def main() -> None:
    with GpuSched() as gs:  # finds the daemon by $GPUSCHED_SOCKET, else at /tmp/gpusched.sock
        gs.run("example", MODEL)
        try:
            # Ready means that it holds VRAM; wait_ready raises when the process ends before.
            gs.wait_ready("example", poll=0.1)
            # Its first line says that the VRAM is filled, and with what.
            with gs.follow_logs("example") as lines:
                before = digest(next(lines))
            print(f"running: {gs.gpu_free_mb()} MiB of the GPU are free")

            frozen = gs.freeze("example")
            print(f"frozen in {frozen['duration_ms']} ms: {gs.gpu_free_mb()} MiB are free")

            # Another program could use the whole GPU here.

            thawed = gs.thaw("example")
            print(f"thawed in {thawed['duration_ms']} ms: {gs.gpu_free_mb()} MiB are free")

            # It goes on where it was, with the same contents. (It checks them itself, too.)
            with gs.follow_logs("example", lines=1) as lines:
                next(lines)  # the last line so far, perhaps from before the freeze
                after = digest(next(lines))
            print("contents are the same" if before == after else "CONTENTS CHANGED")
            if before != after:
                sys.exit(1)
        finally:
            gs.kill("example")


if __name__ == "__main__":
    main()
