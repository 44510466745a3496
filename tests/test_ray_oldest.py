"""The oldest Ray that pyproject.toml allows, in an environment of its own, runs the tests of the integration.

All other tests run with the newest. The private parts of Ray that are used are in ``ray_integration/compat.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from daemons import ROOT

#: Without what takes its own Ray cluster, or CRIU: nothing there depends on more of Ray than these do.
TESTS = ("calls", "control", "failures", "attached", "hooks", "accounting", "migrate")
#: What the tests import beside the package's own dependencies and Ray.
BESIDE = ("hypothesis", "numpy", "pytest", "pytest-asyncio", "pytest-timeout")


def oldest() -> tuple[str, list[str]]:
    """The version, and everything to install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = project["optional-dependencies"]["ray"]
    found = re.fullmatch(r"ray\[default\]>=([\d.]+),<[\d.]+", ray)
    assert found is not None, f"{ray!r} names no oldest version"
    return found[1], [f"ray[default]=={found[1]}", *project["dependencies"], *BESIDE]


def make_environment(directory: Path, wanted: list[str]) -> Path:
    """Its interpreter. Skips where pip cannot get what is wanted."""
    subprocess.run(
        [sys.executable, "-m", "venv", str(directory)], check=True, timeout=60, capture_output=True
    )
    python = directory / "bin" / "python"
    ended = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *wanted],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if ended.returncode:
        pytest.skip(f"pip cannot get {wanted[0]}: {ended.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.ray
@pytest.mark.slow  # an environment with another Ray, and some minutes of tests
@pytest.mark.timeout(1500)
def test_the_oldest_ray_that_is_allowed_passes_the_tests_too(tmp_path: Path) -> None:
    wanted, requirements = oldest()
    if version("ray") == wanted:
        pytest.skip(f"all other tests run with it: Ray {wanted} is installed")
    python = make_environment(tmp_path / "venv", requirements)
    ended = subprocess.run(
        [
            *(str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"),
            *("-o", "filterwarnings=default"),  # of its own: it leaves processes to the collector
            *(str(ROOT / "tests" / f"test_ray_{name}.py") for name in TESTS),
        ],
        env={
            **{name: value for name, value in os.environ.items() if name[:4] != "RAY_"},
            "PYTHONPATH": str(ROOT),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    asked = [str(python), "-c", "import ray; print(ray.__version__)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == f"{wanted}\n"
    print(ended.stdout.rstrip().splitlines()[-1])


def test_the_documents_say_which_versions_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = project["optional-dependencies"]["ray"]
    least, below = re.findall(r"(\d+\.\d+)", ray)
    most = f"{below.split('.')[0]}.{int(below.split('.')[1]) - 1}"
    assert f"Supported are Ray {least} to {most};" in (ROOT / "docs" / "ray.md").read_text()
