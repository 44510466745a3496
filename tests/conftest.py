"""What every test may need: soak counts, a private daemon, and skips that say why."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import hypothesis
import pytest

from daemons import ROOT, PrivateDaemon
from gpusched.mechanisms.criu import program
from gpusched.mechanisms.criu.program import Program

pytest_plugins = ["ray_cluster"]
if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_ray_*.py"]  # they import it

#: Seconds for one test and its fixtures; a hung test fails with every thread's stack.
TIMEOUT_S = 120.0
SOAK_TIMEOUT_S = 3600.0
#: Real VRAM takes real time: a kill of the daemon with all that follows costs some 8 s.
GPU_TIMEOUT_S = 300.0

_PROBE = """
from cuda.bindings import driver
def call(name, *args):
    try:
        result, *values = getattr(driver, name)(*args)
    except Exception as error:
        raise SystemExit(f"no NVIDIA driver ({type(error).__name__})")
    if result != driver.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"{name}: {result.name}")
    return values
call("cuInit", 0)
print(*call("cuDeviceGetCount"))
"""


def _is_soak() -> bool:
    return os.environ.get("GPUSCHED_SOAK", "0") not in ("", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # A busy machine is no defect, so examples have no time limit of their own.
    hypothesis.settings.register_profile(
        "gpusched", deadline=None, max_examples=1000 if _is_soak() else 100
    )
    hypothesis.settings.load_profile("gpusched")
    # Set here, not in pyproject.toml, so that a bare pytest without pytest-timeout still runs.
    if config.pluginmanager.hasplugin("timeout") and config.getoption("timeout") is None:
        config.option.timeout = SOAK_TIMEOUT_S if _is_soak() else TIMEOUT_S


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("timeout") or config.option.timeout != TIMEOUT_S:
        return  # the plugin is not there, or somebody has chosen
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.timeout(GPU_TIMEOUT_S))


@functools.cache
def _usable_gpus() -> tuple[int, str]:
    """How many GPUs a CUDA program can use here, and why not more. Asked in a process of its own: CUDA and
    fork do not mix.
    """
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return 0, "cuInit did not return within 60 s"
    if probe.returncode == 0:
        return int(probe.stdout), f"{int(probe.stdout)} usable"
    return 0, (probe.stderr.strip().splitlines() or ["cuInit failed"])[-1]


def _gpu_reason(mark: pytest.Mark) -> str | None:
    wanted = int(mark.kwargs.get("count", mark.args[0] if mark.args else 1))
    found, reason = _usable_gpus()
    return None if found >= wanted else f"needs {wanted} NVIDIA GPU(s): {reason}"


@functools.cache
def find_criu() -> tuple[Program | None, str]:
    """The CRIU that the tests use, and why there is none: the system's where it works, else what make criu made."""
    found = program.find(os.environ.get("GPUSCHED_CRIU"), private=ROOT / ".criu")
    return found.program, found.why_not


def _criu_reason(mark: pytest.Mark) -> str | None:
    reason = _root_reason(mark)
    if reason is None and find_criu()[0] is None:
        reason = f"{find_criu()[1]} (make criu)"
    return reason


@pytest.fixture(scope="session")
def criu() -> Program:
    """A CRIU that passed its trial; for tests that are marked so."""
    found, why_not = find_criu()
    assert found is not None, why_not
    return found


def _root_reason(_mark: pytest.Mark) -> str | None:
    return None if os.geteuid() == 0 else "needs root"


def _ray_reason(_mark: pytest.Mark) -> str | None:
    return None if importlib.util.find_spec("ray") else "needs ray: pip install 'gpusched[ray]'"


_REASONS = {"gpu": _gpu_reason, "criu": _criu_reason, "root": _root_reason, "ray": _ray_reason}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers():
        check = _REASONS.get(mark.name)
        reason = check(mark) if check is not None else None
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(scope="session")
def soak() -> bool:
    """Whether to do the full counts: ``GPUSCHED_SOAK=1``, as ``make soak`` sets it."""
    return _is_soak()


class StartDaemon(Protocol):
    """What the fixture ``private_daemon`` gives: each call starts one more daemon."""

    def __call__(
        self,
        *,
        gpus: int = 1,
        vram: str = "4G",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> PrivateDaemon: ...


@pytest.fixture
def private_daemon() -> Iterator[StartDaemon]:
    """Starts daemons on simulated GPUs; at teardown everything they manage is ended, and proved gone."""
    daemons: list[PrivateDaemon] = []

    def start(
        *,
        gpus: int = 1,
        vram: str = "4G",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> PrivateDaemon:
        daemon = PrivateDaemon(gpus=gpus, vram=vram, args=args, env=env)
        daemons.append(daemon)
        daemon.start()
        return daemon

    yield start
    errors = []
    for daemon in daemons:
        try:
            daemon.end()
        except AssertionError as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup("a private daemon did not end cleanly", errors)
