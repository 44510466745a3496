"""What both backends promise (``ports.DriverApi``): one suite, on simulated and real GPUs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemons import wait_until
from gpusched import errors
from gpusched.ports import DriverApi, DriverState
from gpusched.units import MIB

GPUS = 2
VRAM_BYTES = 1024 * MIB
DEADLINE_S = 60.0


class Target:
    """A workload whose lines can be read."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self._log = directory / f"log-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "gpusched.workload", "--vram", "48M", "--gpu", "0"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        self.pid = self.process.pid
        wait_until(self.digests, within_s=DEADLINE_S, what="the workload is ready")

    def digests(self) -> list[str]:
        return re.findall(r"digest=([0-9a-f]+)", self._log.read_text())

    def verify(self) -> None:
        """Goes on, with the contents of the beginning."""
        seen = len(self.digests())
        wait_until(lambda: len(self.digests()) > seen + 1, within_s=DEADLINE_S, what="new ticks")
        assert len(set(self.digests())) == 1

    def stands_still(self) -> bool:
        seen = len(self.digests())
        time.sleep(
            0.6
        )  # three ticks: nothing is waited for, only an absence can be seen by looking again
        return len(self.digests()) <= seen + 1

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Backend:
    def __init__(self, kind: str, directory: Path) -> None:
        self._directory = directory
        self._env = {k: v for k, v in os.environ.items() if k != "GPUSCHED_SIM_DIR"}
        self._targets: list[Target] = []
        self.driver: DriverApi
        if kind == "sim":
            from gpusched.mechanisms.sim.driver import SimDriver

            self.driver = SimDriver.create(directory / "sim", GPUS, VRAM_BYTES)
            self._env["GPUSCHED_SIM_DIR"] = str(directory / "sim")
        else:
            from gpusched.mechanisms.cuda.driver import CudaDriver

            self.driver = CudaDriver.open()

    def target(self) -> Target:
        target = Target(self._directory, self._env)
        self._targets.append(target)
        return target

    def state(self, pid: int) -> DriverState:
        return self.driver.states([pid])[pid]

    def end(self) -> None:
        for target in self._targets:
            target.end()


@pytest.fixture(params=["sim", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    made = Backend(request.param, tmp_path)
    yield made
    made.end()


def test_it_describes_its_gpus(backend: Backend) -> None:
    about = backend.driver.describe()
    assert about.gpus
    assert [g.index for g in about.gpus] == list(range(len(about.gpus)))
    assert len({g.uuid for g in about.gpus}) == len(about.gpus)
    assert all(g.uuid.startswith("GPU-") and g.total_bytes > 0 for g in about.gpus)
    assert about.simulated is (about.backend == "sim")


def test_the_states_follow_the_calls_and_the_contents_survive(backend: Backend) -> None:
    target, driver = backend.target(), backend.driver
    assert backend.state(target.pid) is DriverState.RUNNING
    for _ in range(3):
        driver.lock(target.pid, 10.0)
        assert backend.state(target.pid) is DriverState.LOCKED
        assert target.stands_still(), "a locked process makes no CUDA calls"
        driver.checkpoint(target.pid)
        assert backend.state(target.pid) is DriverState.CHECKPOINTED
        driver.restore(target.pid, None)
        assert backend.state(target.pid) is DriverState.LOCKED
        driver.unlock(target.pid)
        assert backend.state(target.pid) is DriverState.RUNNING
        target.verify()


def test_a_checkpoint_gives_the_memory_back(backend: Backend) -> None:
    target, driver = backend.target(), backend.driver
    before = driver.usage()
    held = before.processes[target.pid]
    (gpu,) = held
    assert held[gpu] >= 48 * MIB
    driver.lock(target.pid, 10.0)
    driver.checkpoint(target.pid)
    after = driver.usage()
    assert target.pid not in after.processes or not sum(after.processes[target.pid].values())
    assert after.gpus[gpu].free_bytes >= before.gpus[gpu].free_bytes + 48 * MIB
    for memory in after.gpus.values():
        assert memory.used_bytes + memory.free_bytes <= memory.total_bytes
    driver.restore(target.pid, None)
    driver.unlock(target.pid)
    target.verify()


def test_a_checkpointed_process_may_be_stopped_and_continued(backend: Backend) -> None:
    target, driver = backend.target(), backend.driver
    driver.lock(target.pid, 10.0)
    driver.checkpoint(target.pid)
    os.kill(target.pid, signal.SIGSTOP)
    stat = Path(f"/proc/{target.pid}/stat")
    wait_until(lambda: ") T " in stat.read_text(), within_s=DEADLINE_S, what="it has stopped")
    assert backend.state(target.pid) is DriverState.CHECKPOINTED
    with pytest.raises(errors.DriverError):  # its own threads serve the call
        driver.restore(target.pid, None)
    os.kill(target.pid, signal.SIGCONT)
    assert backend.state(target.pid) is DriverState.CHECKPOINTED
    driver.restore(target.pid, None)
    driver.unlock(target.pid)
    target.verify()


def test_calls_in_the_wrong_order_change_nothing(backend: Backend) -> None:
    target, driver = backend.target(), backend.driver
    calls: list[Callable[[], None]] = [
        lambda: driver.checkpoint(target.pid),
        lambda: driver.restore(target.pid, None),
        lambda: driver.unlock(target.pid),
    ]
    for call in calls:
        with pytest.raises(errors.DriverError) as caught:
            call()
        assert caught.value.details["pid"] == target.pid
        assert backend.state(target.pid) is DriverState.RUNNING
    driver.lock(target.pid, 10.0)
    with pytest.raises(errors.DriverError):
        driver.restore(target.pid, None)
    assert backend.state(target.pid) is DriverState.LOCKED
    driver.unlock(target.pid)
    target.verify()


def test_processes_without_cuda_have_no_state(backend: Backend) -> None:
    with subprocess.Popen(["sleep", "60"]) as plain:
        assert backend.state(plain.pid) is DriverState.NONE
        with pytest.raises(errors.GpuschedError):
            backend.driver.lock(plain.pid, 1.0)
        plain.kill()
    assert backend.state(plain.pid) is DriverState.NONE, "gone"
    with pytest.raises(errors.GpuschedError):
        backend.driver.lock(plain.pid, 1.0)


def test_a_map_must_be_a_permutation(backend: Backend) -> None:
    target, driver = backend.target(), backend.driver
    if not driver.describe().can_migrate:
        pytest.skip("this driver moves nothing between GPUs")
    driver.lock(target.pid, 10.0)
    driver.checkpoint(target.pid)
    (uuid, *_) = [g.uuid for g in driver.describe().gpus]
    with pytest.raises(errors.GpuschedError):
        driver.restore(target.pid, {uuid: "GPU-00000000-0000-0000-0000-000000000000"})
    assert backend.state(target.pid) is DriverState.CHECKPOINTED
    driver.restore(target.pid, {g.uuid: g.uuid for g in driver.describe().gpus})
    driver.unlock(target.pid)
    target.verify()


def test_a_process_moves_to_another_gpu_and_back(backend: Backend) -> None:
    driver = backend.driver
    uuids = [g.uuid for g in driver.describe().gpus]
    if len(uuids) < 2:
        pytest.skip("needs two GPUs")
    target = backend.target()
    swapped = {uuids[0]: uuids[1], uuids[1]: uuids[0]} | {u: u for u in uuids[2:]}
    for expected in (uuids[1], uuids[0]):
        driver.lock(target.pid, 10.0)
        driver.checkpoint(target.pid)
        driver.restore(target.pid, swapped)
        driver.unlock(target.pid)
        assert list(driver.usage().processes[target.pid]) == [expected]
        target.verify()


def test_a_plain_process_has_no_obstacles(backend: Backend) -> None:
    assert backend.driver.obstacles([backend.target().pid]) == []
