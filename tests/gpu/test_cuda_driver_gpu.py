"""The CUDA backend on a real GPU: bare driver calls on a small process, contents verified each time."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gpusched import errors
from gpusched.mechanisms.cuda import preflight
from gpusched.mechanisms.cuda.driver import CudaDriver
from gpusched.ports import DriverState

pytestmark = pytest.mark.gpu

VRAM_BYTES = 64 << 20
DEADLINE_S = 30.0

# Answers each line on stdin with one line: "digest" reads the VRAM back; "busy" leaves work on the GPU that waits for a
# word in host memory, and "release" writes that word without a call of the driver.
TARGET = """
import ctypes, hashlib, random, sys
from cuda.bindings import driver as cuda
kind, size = sys.argv[1], int(sys.argv[2])
def do(results):
    assert results[0] == cuda.CUresult.CUDA_SUCCESS, results[0]
    return results[1] if len(results) > 1 else None
do(cuda.cuInit(0))
device = do(cuda.cuDeviceGet(0))
do(cuda.cuCtxSetCurrent(do(cuda.cuDevicePrimaryCtxRetain(device))))
contents = random.Random(7).randbytes(size)
if kind == "nvml":
    import pynvml
    pynvml.nvmlInit()
    pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
if kind == "managed":
    memory = do(cuda.cuMemAllocManaged(size, cuda.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL))
else:
    memory = do(cuda.cuMemAlloc(size))
do(cuda.cuMemcpyHtoD(memory, contents, size))
word = do(cuda.cuMemHostAlloc(4, cuda.CU_MEMHOSTALLOC_DEVICEMAP))
ctypes.memset(int(word), 0, 4)
stream = do(cuda.cuStreamCreate(1))
print("ready", hashlib.sha256(contents).hexdigest(), flush=True)
for line in sys.stdin:
    if line == "digest\\n":
        back = bytearray(size)
        do(cuda.cuMemcpyDtoH(back, memory, size))
        print(hashlib.sha256(back).hexdigest(), flush=True)
    elif line == "busy\\n":
        where = do(cuda.cuMemHostGetDevicePointer(int(word), 0))
        do(cuda.cuStreamWaitValue32(stream, where, 1, 0))
        print("busy", flush=True)
    elif line == "release\\n":
        ctypes.c_uint32.from_address(int(word)).value = 1
        print("released", flush=True)
"""


class Target:
    """A small CUDA process that this test started."""

    def __init__(self, kind: str = "plain", size: int = VRAM_BYTES) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", TARGET, kind, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self._child.pid
        ready, self.digest = self._line().split()
        assert ready == "ready"

    def _line(self) -> str:
        assert self._child.stdout is not None
        readable, _, _ = select.select([self._child.stdout], [], [], DEADLINE_S)
        assert readable, "the target does not answer"
        return str(self._child.stdout.readline()).strip()

    def ask(self, question: str) -> str:
        assert self._child.stdin is not None
        self._child.stdin.write(question + "\n")
        return self._line()

    def end(self) -> None:
        self._child.kill()
        self._child.communicate()


@pytest.fixture(scope="module")
def driver() -> CudaDriver:
    try:
        return CudaDriver.open()
    except errors.Unsupported as error:
        pytest.skip(f"no usable GPU: {error}")


@pytest.fixture
def start() -> Iterator[Callable[..., Target]]:
    started: list[Target] = []

    def run(kind: str = "plain", size: int = VRAM_BYTES) -> Target:
        started.append(Target(kind, size))
        return started[-1]

    yield run
    for target in started:
        target.end()


def state(driver: CudaDriver, pid: int) -> DriverState:
    return driver.states([pid])[pid]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + DEADLINE_S
    while not preflight.is_stopped(pid):
        assert time.monotonic() < deadline


def test_it_describes_the_gpus(driver: CudaDriver) -> None:
    about = driver.describe()
    assert about.backend == "cuda"
    assert [gpu.index for gpu in about.gpus] == list(range(len(about.gpus)))
    assert all(gpu.uuid.startswith("GPU-") and gpu.total_bytes > 1 << 30 for gpu in about.gpus)
    usage = driver.usage()
    assert set(usage.gpus) == {gpu.uuid for gpu in about.gpus}


@pytest.mark.parametrize("kind", ["plain", "nvml"])
def test_freeze_and_thaw_keep_the_contents(
    driver: CudaDriver, start: Callable[..., Target], kind: str
) -> None:
    target = start(kind)
    assert state(driver, target.pid) is DriverState.RUNNING
    assert sum(driver.usage().processes[target.pid].values()) > VRAM_BYTES

    driver.lock(target.pid, 10.0)
    assert state(driver, target.pid) is DriverState.LOCKED
    driver.checkpoint(target.pid)
    assert state(driver, target.pid) is DriverState.CHECKPOINTED
    assert target.pid not in driver.usage().processes

    stop(target.pid)
    assert state(driver, target.pid) is DriverState.CHECKPOINTED  # told from /proc
    os.kill(target.pid, signal.SIGCONT)

    driver.restore(target.pid, None)
    assert state(driver, target.pid) is DriverState.LOCKED
    driver.unlock(target.pid)
    assert state(driver, target.pid) is DriverState.RUNNING
    assert target.ask("digest") == target.digest


def test_a_plain_process_has_no_obstacle_before_and_after_a_freeze(
    driver: CudaDriver, start: Callable[..., Target]
) -> None:
    target = start()
    assert driver.obstacles([target.pid]) == []
    driver.lock(target.pid, 10.0)
    driver.checkpoint(target.pid)
    driver.restore(target.pid, None)
    driver.unlock(target.pid)
    assert driver.obstacles([target.pid]) == []


def test_states_do_not_wait_for_a_checkpoint(
    driver: CudaDriver, start: Callable[..., Target]
) -> None:
    target = start()
    driver.lock(target.pid, 10.0)
    seen: set[DriverState] = set()
    moving = threading.Thread(target=driver.checkpoint, args=[target.pid])
    moving.start()
    while moving.is_alive():
        before = time.monotonic()
        seen.add(state(driver, target.pid))
        assert time.monotonic() - before < 1.0
    assert DriverState.CHANGING in seen
    driver.restore(target.pid, None)
    driver.unlock(target.pid)
    assert target.ask("digest") == target.digest


def test_a_busy_process_times_out_and_runs_on(
    driver: CudaDriver, start: Callable[..., Target]
) -> None:
    target = start()
    assert target.ask("busy") == "busy"
    with pytest.raises(errors.LockTimeout):
        driver.lock(target.pid, 0.5)
    assert state(driver, target.pid) is DriverState.RUNNING
    assert target.ask("release") == "released"
    driver.lock(target.pid, 10.0)
    driver.unlock(target.pid)
    assert target.ask("digest") == target.digest


def test_a_process_without_cuda_and_a_vanished_one_have_no_state(driver: CudaDriver) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        assert state(driver, sleeper.pid) is DriverState.NONE
        assert driver.obstacles([sleeper.pid]) == []
        sleeper.kill()
    assert state(driver, sleeper.pid) is DriverState.NONE
    with pytest.raises(errors.DriverError):
        driver.lock(sleeper.pid, 1.0)


def test_a_stopped_process_is_refused_and_never_waited_for(
    driver: CudaDriver, start: Callable[..., Target]
) -> None:
    target = start()
    stop(target.pid)
    assert [(o.kind, o.certain) for o in driver.obstacles([target.pid])] == [("stopped", True)]
    with pytest.raises(errors.DriverError, match="is stopped"):
        driver.lock(target.pid, 1.0)
    assert state(driver, target.pid) is DriverState.UNKNOWN
    os.kill(target.pid, signal.SIGCONT)
    assert state(driver, target.pid) is DriverState.RUNNING
    assert target.ask("digest") == target.digest


def test_managed_memory_is_seen_and_refused_by_the_driver_too(
    driver: CudaDriver, start: Callable[..., Target]
) -> None:
    target = start("managed", 4 << 20)
    assert [o.kind for o in driver.obstacles([target.pid])] == ["managed_memory"]
    driver.lock(target.pid, 10.0)
    with pytest.raises(errors.Unsupported):
        driver.checkpoint(target.pid)
    driver.unlock(target.pid)
    assert target.ask("digest") == target.digest


@pytest.mark.gpu(count=2)
def test_a_process_moves_to_the_other_gpu_and_back(
    driver: CudaDriver, start: Callable[..., Target]
) -> None:
    uuids = [gpu.uuid for gpu in driver.describe().gpus]
    target = start()
    (home,) = driver.usage().processes[target.pid]
    other = next(gpu for gpu in uuids if gpu != home)
    for there in (other, home):
        driver.lock(target.pid, 10.0)
        driver.checkpoint(target.pid)
        driver.restore(target.pid, {home: other, other: home})
        driver.unlock(target.pid)
        assert set(driver.usage().processes[target.pid]) == {there}
        assert target.ask("digest") == target.digest
