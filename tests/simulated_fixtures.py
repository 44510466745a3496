"""Fixtures for tests on simulated GPUs; a test module names this one in ``pytest_plugins``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusched.mechanisms.sim.driver import SimDriver
from gpusched.mechanisms.sim.script import Script
from simulated_program import VRAM, Program, Start


@pytest.fixture
def directory() -> Iterator[Path]:
    below = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="gpusched-test-", dir=below))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def sim(directory: Path) -> SimDriver:
    return SimDriver.create(directory, 2, VRAM)


@pytest.fixture
def start(directory: Path, sim: SimDriver) -> Iterator[Start]:
    programs: list[Program] = []

    def start(visible: str | None = None) -> Program:
        programs.append(Program(directory, visible))
        return programs[-1]

    yield start
    for program in programs:
        program.end()


@pytest.fixture
def script(directory: Path) -> Script:
    return Script(directory)
