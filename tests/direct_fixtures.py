"""Fixtures for tests of the line-rate path; a test module names this one in ``pytest_plugins``."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import standin_cuda
from direct_bench import Bench
from gpusched.mechanisms.cuda import pool
from gpusched.units import MIB


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("standin")
    standin_cuda.build(directory)
    return directory


@pytest.fixture
def standin(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "processes").mkdir()
    monkeypatch.setenv("STANDIN_DIR", str(tmp_path / "processes"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(built))
    monkeypatch.setattr(pool, "CHUNK_BYTES", 16 * MIB)
    monkeypatch.setattr("gpusched.mechanisms.cuda.mover_client.CHUNK_BYTES", 16 * MIB)
    return built


@pytest.fixture
def home() -> Iterator[Path]:
    """Where the pool lies: in memory."""
    path = Path(f"/dev/shm/gpusched-test-{os.getpid()}-{random.randrange(10**9)}")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def bench(standin: Path, tmp_path: Path, home: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, home)
    yield made
    made.direct.close()
