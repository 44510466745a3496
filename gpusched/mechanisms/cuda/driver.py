"""The CUDA driver's checkpoint calls and NVML, as ``ports.DriverApi``: blocking, safe from many threads.

Covers: opening the driver, its calls, its states. Does not cover: deadlines and crashes (the helper process that
holds this object), what NVML reads (``nvml.py``), what to refuse (``preflight.py``), the order of the calls (the
engine).
See also: docs/decisions/0004-driver-api-in-a-helper.md.

Foreign errors become ours here, once: ``failure`` for the driver's results, ``open`` for what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from gpusched import errors
from gpusched.mechanisms.cuda import preflight
from gpusched.mechanisms.cuda.nvml import Nvml
from gpusched.ports import Description, DriverState, Obstacle, Usage
from gpusched.units import GIB

#: The first driver that moves processes between GPUs and leaves them whole after an error.
SUPPORTED_DRIVER: Final = 580
#: The first driver with the checkpoint calls.
OLDEST_DRIVER: Final = 570
#: What the context of a process is taken for. PyTorch's kept 0.5 GB on an H100; large modules add to it.
CONTEXT_BYTES: Final = GIB

_STATES: Final[Mapping[int, DriverState]] = {
    0: DriverState.RUNNING,
    1: DriverState.LOCKED,
    2: DriverState.CHECKPOINTED,
    3: DriverState.FAILED,
    4: DriverState.CHANGING,  # CHECKPOINTING, drivers after 580
    5: DriverState.CHANGING,  # RESTORING
}
#: How long ``states`` waits for the driver: it answers in well under a millisecond unless a move is under way.
_PATIENCE_S: Final = 0.25
_DRIVER_THREADS: Final = (b"cuda",)


# -- pure -----------------------------------------------------------------------------------------


def parse_state(number: int) -> DriverState:
    return _STATES.get(number, DriverState.UNKNOWN)


def check_version(version: str, *, allow_old: bool) -> int:
    """``"580.159.04"`` -> 580. Raises Unsupported for a driver that cannot do the work, with what to do."""
    try:
        major = int(version.partition(".")[0])
    except ValueError:
        raise errors.Unsupported(
            f"the NVIDIA driver's version is not understood: {version!r}"
        ) from None
    if major < OLDEST_DRIVER:
        raise errors.Unsupported(
            f"NVIDIA driver {version} cannot checkpoint processes; install {SUPPORTED_DRIVER} or newer",
            {"driver_version": version},
        )
    if major < SUPPORTED_DRIVER and not allow_old:
        raise errors.Unsupported(
            f"NVIDIA driver {version} may lose a process when a checkpoint fails and cannot move one to another "
            f"GPU; install {SUPPORTED_DRIVER} or newer, or start the daemon with --allow-old-driver",
            {"driver_version": version},
        )
    return major


def full_permutation(gpu_map: Mapping[str, str], gpus: Collection[str]) -> dict[str, str]:
    """``gpu_map`` with every other GPU staying where it is. Raises InvalidRequest when that is no permutation.

    The driver wants a pair for each GPU that it recorded, also those that CUDA_VISIBLE_DEVICES hid from the target;
    with fewer it refuses (INVALID_VALUE), and the process stays checkpointed.
    """
    full = {gpu: gpu_map.get(gpu, gpu) for gpu in gpus}
    if not gpu_map.keys() <= full.keys() or sorted(full.values()) != sorted(full):
        raise errors.InvalidRequest(
            "a GPU map must be a permutation of this machine's GPUs", {"gpu_map": dict(gpu_map)}
        )
    return full


def failure(call: str, result: str, pid: int) -> errors.GpuschedError:
    """Our error for a call that did not succeed. ``call``: lock, checkpoint, restore or unlock."""
    details = {"call": call, "result": result, "pid": pid}
    if call == "lock" and result == "CUDA_ERROR_NOT_READY":
        return errors.LockTimeout(
            f"process {pid} did not come to rest in time and runs on; try again with a longer lock timeout",
            details,
        )
    if call in {"lock", "checkpoint"} and result == "CUDA_ERROR_NOT_SUPPORTED":
        return errors.Unsupported(
            f"the driver refuses to {call} process {pid}: it uses what cannot be checkpointed, such as managed "
            "memory, CUDA IPC or MIG",
            details,
        )
    if call == "restore" and result == "CUDA_ERROR_OUT_OF_MEMORY":
        return errors.InsufficientGpuMemory(
            f"process {pid} did not fit when the driver restored it; its state says whether it can be tried again",
            details,
        )
    return errors.DriverError(f"the driver could not {call} process {pid}: {result}", details)


# -- values of the bindings -----------------------------------------------------------------------


def cuda_uuid(cuda: Any, text: str) -> Any:
    """``"GPU-..."`` as a CUuuid, whose bytes the bindings let nobody assign."""
    made = cuda.CUuuid()
    ctypes.memmove(int(made.getPtr()), uuid.UUID(text.removeprefix("GPU-")).bytes, 16)
    return made


def restore_args(cuda: Any, permutation: Mapping[str, str]) -> Any:
    """Arguments for a restore onto other GPUs; everything else in them stays zero, as old drivers expect."""
    pairs = []
    for old, new in permutation.items():
        pair = cuda.CUcheckpointGpuPair()
        pair.oldUuid, pair.newUuid = cuda_uuid(cuda, old), cuda_uuid(cuda, new)
        pairs.append(pair)
    args = cuda.CUcheckpointRestoreArgs()
    args.gpuPairs = pairs
    args.gpuPairsCount = len(pairs)
    return args


# -- the driver -----------------------------------------------------------------------------------


class _Question(threading.Thread):
    """One get-state call. It may hang as long as a move is under way in the target, or the target is stopped."""

    def __init__(self, ask: Callable[[int], DriverState], pid: int) -> None:
        super().__init__(name=f"state-{pid}", daemon=True)
        self._ask, self._pid = ask, pid
        self.answer: DriverState | None = None

    def run(self) -> None:
        self.answer = self._ask(self._pid)


class CudaDriver:
    """``ports.DriverApi`` on real GPUs. One for a process; made by ``open``."""

    def __init__(self, cuda: Any, nvml: Nvml, about: Description) -> None:
        self._cuda, self._nvml, self._about = cuda, nvml, about
        self._lock = threading.Lock()
        self._moving: set[int] = set()  # checkpoint or restore called from here and not back yet
        self._asking: dict[int, _Question] = {}

    def __repr__(self) -> str:
        return f"<CudaDriver {self._about.driver_version} {len(self._about.gpus)} GPUs>"

    @classmethod
    def open(cls, allow_old_driver: bool = False) -> CudaDriver:
        """Loads driver and NVML and calls cuInit. Raises Unsupported, with what to do, where they cannot serve.

        Blocks for up to some seconds where no other process keeps the GPUs initialised.
        """
        nvml = Nvml.open()
        try:
            version = nvml.driver_version()
            major = check_version(version, allow_old=allow_old_driver)
            cuda = _open_cuda()
            about = Description(
                backend="cuda",
                simulated=False,
                driver_version=version,
                gpus=nvml.find_gpus(),
                can_migrate=major >= SUPPORTED_DRIVER and hasattr(cuda, "CUcheckpointGpuPair"),
                context_bytes=CONTEXT_BYTES,
            )
        except BaseException:
            nvml.close()
            raise
        return cls(cuda, nvml, about)

    def describe(self) -> Description:
        return self._about

    # -- moves

    def lock(self, pid: int, timeout_s: float) -> None:
        """CUDA calls of ``pid`` block from here on. Blocks up to ``timeout_s``; on LockTimeout it runs on."""
        args = self._cuda.CUcheckpointLockArgs()
        args.timeoutMs = max(1, round(timeout_s * 1000))  # 0 would wait for ever
        self._call("lock", pid, args)

    def checkpoint(self, pid: int, *, keep_context: bool = False) -> None:
        """Device memory to host memory. Blocks: about half a second and another for each 2 GB."""
        with self._move(pid):
            self._call("checkpoint", pid, None)

    def restore(self, pid: int, gpu_map: Mapping[str, str] | None) -> None:
        """Host memory to device memory. Blocks: a quarter of a second and another second for each 4 GB.

        Raises InsufficientGpuMemory when it did not fit: some drivers can then never restore it, so look first.
        """
        args = None
        if gpu_map is not None:
            if not self._about.can_migrate:
                raise errors.Unsupported(
                    f"driver {self._about.driver_version} cannot move processes between GPUs"
                )
            args = restore_args(
                self._cuda, full_permutation(gpu_map, [gpu.uuid for gpu in self._about.gpus])
            )
        with self._move(pid):
            self._call("restore", pid, args)

    def unlock(self, pid: int) -> None:
        self._call("unlock", pid, None)

    def absorb(self, pid: int) -> None:
        """The driver keeps what it saves in the process's own memory."""

    def _call(self, call: str, pid: int, args: Any) -> None:
        if preflight.is_stopped(pid):
            # The driver's threads in the target serve these calls: stopped, no timeout would bring us back.
            raise errors.DriverError(
                f"process {pid} is stopped; continue it before a {call}",
                {"call": call, "result": "stopped", "pid": pid},
            )
        function = getattr(self._cuda, f"cuCheckpointProcess{call.capitalize()}")
        try:
            (result,) = function(pid, args)
        except ValueError as error:  # a result that these bindings do not know
            raise failure(call, str(error), pid) from error
        if result != self._cuda.CUresult.CUDA_SUCCESS:
            raise failure(call, result.name, pid)

    @contextlib.contextmanager
    def _move(self, pid: int) -> Iterator[None]:
        with self._lock:
            self._moving.add(pid)
        try:
            yield
        finally:
            with self._lock:
                self._moving.discard(pid)

    # -- states

    def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        """Blocks for at most a quarter of a second: a process that does not answer by then is CHANGING.

        A stopped process cannot answer at all: CHECKPOINTED is told from /proc; of one whose CUDA still holds the
        GPU nobody can say whether it is locked, so it is UNKNOWN until it is continued.
        """
        found: dict[int, DriverState] = {}
        questions: dict[int, _Question] = {}
        for pid in pids:
            known = self._known(pid)
            if known is None:
                questions[pid] = self._ask(pid)
            else:
                found[pid] = known
        until = monotonic() + _PATIENCE_S
        for pid, question in questions.items():
            question.join(max(0.0, until - monotonic()))
            if question.is_alive():
                found[pid] = DriverState.CHANGING
            else:
                found[pid] = question.answer or DriverState.UNKNOWN
        return found

    def _known(self, pid: int) -> DriverState | None:
        """What need not or must not be asked of the driver; None: ask."""
        letter = preflight.read_state(pid)
        if letter is None or letter in {"Z", "X"}:
            return DriverState.NONE
        with self._lock:
            if pid in self._moving:
                return DriverState.CHANGING
        if letter not in {"T", "t"}:
            return None
        is_on_gpu, has_threads = _traces(pid)
        if (
            not has_threads
        ):  # perhaps a forked child, which has its parent's descriptors and no CUDA of its own
            return DriverState.NONE
        return DriverState.UNKNOWN if is_on_gpu else DriverState.CHECKPOINTED

    def _ask(self, pid: int) -> _Question:
        """A question that is still unanswered is shared, so that a process which hangs costs one thread."""
        with self._lock:
            self._asking = {p: q for p, q in self._asking.items() if q.is_alive()}
            question = self._asking.get(pid)
            if question is None:
                question = self._asking[pid] = _Question(self._get_state, pid)
                question.start()
            return question

    def _get_state(self, pid: int) -> DriverState:
        try:
            result, state = self._cuda.cuCheckpointProcessGetState(pid)
        except ValueError:  # a number that these bindings do not know
            return DriverState.UNKNOWN
        if result == self._cuda.CUresult.CUDA_SUCCESS:
            return parse_state(int(state))
        # "Not initialized" is the answer for a process without CUDA. Anything else is believed to mean the same
        # only where /proc agrees: to call a frozen process empty would lose it.
        if result == self._cuda.CUresult.CUDA_ERROR_NOT_INITIALIZED or not any(_traces(pid)):
            return DriverState.NONE
        return DriverState.UNKNOWN

    # -- NVML

    def usage(self) -> Usage:
        """Blocks for some milliseconds."""
        return self._nvml.usage()

    def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        """What would make a checkpoint or the restore after it fail. Blocks for about 2 ms a process."""
        return preflight.find_obstacles(pids, self._nvml)


def _traces(pid: int) -> tuple[bool, bool]:
    """Whether CUDA holds a GPU for a process, and whether it has the driver's threads. Unreadable counts as both."""
    try:
        is_on_gpu = preflight.read_links(pid).holds_uvm
        return is_on_gpu, preflight.has_thread(pid, _DRIVER_THREADS) is not None
    except PermissionError:
        return True, True
    except OSError:
        return False, False


# -- opening --------------------------------------------------------------------------------------


def _open_cuda() -> Any:
    """The driver's bindings, after cuInit: without it a restore fails where persistence mode is off."""
    try:
        from cuda.bindings import driver as cuda

        (result,) = cuda.cuInit(0)
    except ImportError as error:
        raise errors.Unsupported(
            "cuda-bindings is not installed; install gpusched with its dependencies"
        ) from error
    except RuntimeError as error:
        raise errors.Unsupported(f"the CUDA driver library cannot be loaded: {error}") from error
    if result != cuda.CUresult.CUDA_SUCCESS:
        raise errors.Unsupported(
            f"the CUDA driver does not start: {result.name}; see whether nvidia-smi works, and dmesg",
            {"call": "cuInit", "result": result.name},
        )
    if not hasattr(cuda, "cuCheckpointProcessLock"):
        raise errors.Unsupported("cuda-bindings is too old for checkpoints; install 12.8 or newer")
    return cuda
