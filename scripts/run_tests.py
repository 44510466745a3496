"""Every test but the slow ones: what ``make test`` runs.

The tests of Ray wait for most of their time, for processes that start and limits that pass. So they run beside the
others, in a process of their own; what they say comes last. Those that use a GPU run one after the other.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile

PYTEST = (sys.executable, "-m", "pytest")
BESIDE = "ray and not gpu and not slow"
OTHERS = "not slow and (gpu or not ray)"


def main() -> int:
    """The first exit status that is not 0, and 0 where both are."""
    with tempfile.TemporaryFile() as said:
        beside = subprocess.Popen([*PYTEST, "-m", BESIDE], stdout=said, stderr=subprocess.STDOUT)
        try:
            others = subprocess.run([*PYTEST, "-m", OTHERS], check=False).returncode
            print("\n== the tests of Ray, which ran meanwhile", flush=True)
            with_ray = beside.wait()
        finally:
            beside.terminate()
        said.seek(0)
        shutil.copyfileobj(said, sys.stdout.buffer)
    return others or with_ray


if __name__ == "__main__":
    sys.exit(main())
