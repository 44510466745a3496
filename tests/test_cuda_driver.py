"""What of the CUDA backend can be seen without a GPU: versions, errors, arguments, and states that must not hang."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import driver as cuda

from gpusched import errors
from gpusched.mechanisms.cuda import preflight
from gpusched.mechanisms.cuda.driver import (
    CudaDriver,
    check_version,
    cuda_uuid,
    failure,
    full_permutation,
    parse_state,
    restore_args,
)
from gpusched.mechanisms.cuda.nvml import Nvml, used_bytes
from gpusched.ports import Description, DriverState

A, B, C = (f"GPU-{uuid.UUID(int=number)}" for number in (1, 2, 3))


def test_a_supported_driver_is_accepted() -> None:
    assert check_version("580.159.04", allow_old=False) == 580
    assert check_version("595.71", allow_old=False) == 595


def test_an_old_driver_needs_to_be_allowed() -> None:
    with pytest.raises(errors.Unsupported, match="--allow-old-driver"):
        check_version("570.86.10", allow_old=False)
    assert check_version("570.86.10", allow_old=True) == 570


@pytest.mark.parametrize("version", ["565.57.01", "", "R580"])
def test_a_driver_without_checkpoints_is_refused_even_if_allowed(version: str) -> None:
    with pytest.raises(errors.Unsupported):
        check_version(version, allow_old=True)


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (0, "running"),
        (1, "locked"),
        (2, "checkpointed"),
        (3, "failed"),
        (4, "changing"),
        (5, "changing"),
        (9, "unknown"),
    ],
)
def test_states_are_read_leniently(number: int, state: str) -> None:
    assert parse_state(number) == DriverState(state)


@pytest.mark.parametrize(
    ("call", "result", "expected"),
    [
        ("lock", "CUDA_ERROR_NOT_READY", errors.LockTimeout),
        ("checkpoint", "CUDA_ERROR_NOT_READY", errors.DriverError),
        ("checkpoint", "CUDA_ERROR_NOT_SUPPORTED", errors.Unsupported),
        ("restore", "CUDA_ERROR_NOT_SUPPORTED", errors.DriverError),
        ("restore", "CUDA_ERROR_OUT_OF_MEMORY", errors.InsufficientGpuMemory),
        ("checkpoint", "CUDA_ERROR_OUT_OF_MEMORY", errors.DriverError),
        ("unlock", "CUDA_ERROR_ILLEGAL_STATE", errors.DriverError),
    ],
)
def test_results_become_errors_with_their_facts(
    call: str, result: str, expected: type[errors.GpuschedError]
) -> None:
    error = failure(call, result, 42)
    assert type(error) is expected
    assert error.details == {"call": call, "result": result, "pid": 42}
    assert "42" in error.message


def test_gpus_that_a_map_leaves_out_stay_where_they_are() -> None:
    assert full_permutation({A: B, B: A}, [A, B, C]) == {A: B, B: A, C: C}


@pytest.mark.parametrize("gpu_map", [{A: B}, {A: "GPU-elsewhere"}, {"GPU-elsewhere": A}])
def test_a_map_that_is_no_permutation_is_refused(gpu_map: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidRequest):
        full_permutation(gpu_map, [A, B, C])


def test_a_uuid_arrives_as_its_bytes() -> None:
    text = "GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
    assert cuda_uuid(cuda, text).bytes == bytes.fromhex("0f1e2d3c4b5a69788796a5b4c3d2e1f0")


def test_restore_arguments_hold_the_pairs_and_zeros_elsewhere() -> None:
    args = restore_args(cuda, {A: B, B: A})
    raw = ctypes.string_at(int(args.getPtr()), 64)
    pairs = ctypes.string_at(int.from_bytes(raw[:8], "little"), 64)
    a, b = (1).to_bytes(16, "big"), (2).to_bytes(16, "big")
    assert pairs == a + b + b + a
    assert raw[8:12] == (2).to_bytes(4, "little")
    assert not any(raw[12:])


@pytest.mark.parametrize("told", [None, -1, 2**64 - 1])
def test_vram_that_the_driver_does_not_tell_counts_as_none(told: int | None) -> None:
    assert used_bytes(SimpleNamespace(usedGpuMemory=told)) == 0
    assert used_bytes(SimpleNamespace(usedGpuMemory=5 << 30)) == 5 << 30


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(_has_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_the_error_says_what_to_do() -> None:
    with pytest.raises(errors.Unsupported, match="install the NVIDIA driver"):
        CudaDriver.open()


# -- states: what is asked of the driver, and what must not be ------------------------------------


class Bindings:
    """The bindings with a get-state that the test answers; everything else is the real module's."""

    CUresult = cuda.CUresult

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answer: tuple[Any, Any] = (cuda.CUresult.CUDA_SUCCESS, 0)
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def cuCheckpointProcessGetState(self, pid: int) -> tuple[Any, Any]:  # noqa: N802 - the driver's name
        self.asked.append(pid)
        assert self.gate.wait(20)
        return self.answer


@pytest.fixture
def bindings() -> Iterator[Bindings]:
    made = Bindings()
    yield made
    made.gate.set()


@pytest.fixture
def driver(bindings: Bindings) -> CudaDriver:
    about = Description(
        backend="cuda", simulated=False, driver_version="580.0", gpus=(), can_migrate=False
    )
    return CudaDriver(bindings, Nvml(SimpleNamespace()), about)


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while not preflight.is_stopped(pid):
        assert time.monotonic() < deadline


def test_the_driver_is_asked_for_a_running_process(
    driver: CudaDriver, child: int, bindings: Bindings
) -> None:
    bindings.answer = (cuda.CUresult.CUDA_SUCCESS, 2)
    assert driver.states([child]) == {child: DriverState.CHECKPOINTED}
    assert bindings.asked == [child]


@pytest.mark.parametrize(
    "result", [cuda.CUresult.CUDA_ERROR_NOT_INITIALIZED, cuda.CUresult.CUDA_ERROR_OPERATING_SYSTEM]
)
def test_an_error_for_a_process_without_cuda_means_none(
    driver: CudaDriver, child: int, bindings: Bindings, result: Any
) -> None:
    bindings.answer = (result, None)
    assert driver.states([child]) == {child: DriverState.NONE}


def test_a_process_that_does_not_answer_is_changing_and_costs_one_thread(
    driver: CudaDriver, child: int, bindings: Bindings
) -> None:
    bindings.gate.clear()
    assert driver.states([child, child]) == {child: DriverState.CHANGING}
    assert driver.states([child]) == {child: DriverState.CHANGING}
    assert bindings.asked == [child]
    bindings.gate.set()
    deadline = time.monotonic() + 5
    while driver.states([child]) != {child: DriverState.RUNNING}:
        assert time.monotonic() < deadline


def test_a_vanished_process_and_a_zombie_are_none_without_asking(
    driver: CudaDriver, bindings: Bindings
) -> None:
    ended = subprocess.Popen(["true"])
    deadline = time.monotonic() + 5
    while preflight.read_state(ended.pid) != "Z":
        assert time.monotonic() < deadline
    assert driver.states([ended.pid]) == {ended.pid: DriverState.NONE}
    ended.wait()
    assert driver.states([ended.pid]) == {ended.pid: DriverState.NONE}
    assert bindings.asked == []


@pytest.mark.parametrize("devices", [[], ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm"]])
def test_a_stopped_process_without_the_drivers_threads_has_no_cuda_of_its_own(
    driver: CudaDriver,
    child: int,
    bindings: Bindings,
    monkeypatch: pytest.MonkeyPatch,
    devices: list[str],
) -> None:
    """With descriptors of a GPU it is a forked child, such as a data loader's worker."""
    monkeypatch.setattr(preflight, "read_links", lambda _: preflight.parse_links(devices))
    stop(child)
    assert driver.states([child]) == {child: DriverState.NONE}
    assert bindings.asked == []


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([], DriverState.CHECKPOINTED),
        # What NVML opened, as most PyTorch programs let it, stays open through a checkpoint.
        (["/dev/nvidiactl", "/dev/nvidia0"], DriverState.CHECKPOINTED),
        (["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm"], DriverState.UNKNOWN),
    ],
)
def test_a_stopped_process_with_the_drivers_threads_and_without_uvm_is_checkpointed(
    driver: CudaDriver,
    monkeypatch: pytest.MonkeyPatch,
    devices: list[str],
    expected: DriverState,
) -> None:
    code = (
        "import ctypes, threading\n"
        "def run():\n"
        "    ctypes.CDLL(None).prctl(15, b'cuda-EvtHandlr', 0, 0, 0)\n"
        "    print('ready', flush=True)\n"
        "    threading.Event().wait()\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "input()\n"
    )
    if devices:  # they cannot be opened here
        monkeypatch.setattr(preflight, "read_links", lambda _: preflight.parse_links(devices))
    arguments = [sys.executable, "-c", code]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stop(process.pid)
        assert driver.states([process.pid]) == {process.pid: expected}
        process.kill()


@pytest.mark.parametrize("call", ["checkpoint", "unlock"])
def test_a_call_on_a_stopped_process_fails_at_once(
    driver: CudaDriver, child: int, call: str
) -> None:
    stop(child)
    with pytest.raises(errors.DriverError, match="is stopped") as caught:
        getattr(driver, call)(child)
    assert caught.value.details == {"call": call, "result": "stopped", "pid": child}
