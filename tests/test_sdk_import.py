"""What importing the SDK needs and costs."""

from __future__ import annotations

import gpusched
from scripted_server import (
    run_python,
)

# -- what an import costs -----------------------------------------------------------------------------


def test_the_sdk_needs_the_standard_library_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import gpusched
first = set(sys.modules) - before
gpusched.GpuSched, gpusched.AsyncGpuSched, gpusched.errors, gpusched.types
assert set(gpusched.__all__) <= set(dir(gpusched)), dir(gpusched)
print(*sorted(first))
print(*sorted({name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names))
try:
    gpusched.nothing
except AttributeError as error:
    print(error)
"""
    first, foreign, missing = run_python(code, flags=("-S",)).splitlines()
    assert set(first.split()) <= {"__future__", "gpusched"}, "import gpusched loads nothing"
    assert set(foreign.split()) <= {"__main__", "gpusched"}
    assert missing == "module 'gpusched' has no attribute 'nothing'"


def test_the_synchronous_client_loads_no_slow_module() -> None:
    code = "import sys, gpusched; gpusched.GpuSched; print(*sys.modules)"
    loaded = run_python(code, flags=("-S",)).split()
    assert not {"asyncio", "dataclasses", "inspect", "pathlib", "subprocess", "msgspec"} & set(
        loaded
    )


def test_importing_takes_a_few_milliseconds() -> None:
    code = "import time; t = time.perf_counter(); import gpusched; print(time.perf_counter() - t)"
    times_s = [float(run_python(code, flags=("-S",))) for _ in range(5)]
    assert min(times_s) < 0.010


def test_the_version_is_that_of_the_package() -> None:
    assert gpusched.__version__.count(".") == 2
