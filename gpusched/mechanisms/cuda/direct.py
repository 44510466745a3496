"""The driver's calls, with the contents of VRAM taken past it at the speed of the bus where a process allows it.

``ports.DriverApi`` around another one. A process that has ``libgpusched_direct`` in it is brought to rest by its gate;
its memory is handed to the mover of its GPU as descriptors, copied into the pool while the driver checkpoints the small
rest, and made anew on the way back. Everything else goes to the driver, and so does such a process where this way fails
before its memory has left.

    lock        close the gate                               (else the driver's lock)
    checkpoint  export, copy || unmap, the driver's lock and checkpoint; the process holds on to its memory by
                descriptors until the copy is complete
    restore     the driver's restore and unlock; make memory, copy || map
    unlock      open the gate

What is true is asked anew each time: the phase from the process's page, the driver's state, the pool's manifests. So
every call can be repeated after a crash of anybody, and goes on from where things are.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.cuda.mover_client import Movers
from gpusched.mechanisms.cuda.passage import LOCK_S, NotBegun, Passage, Phases
from gpusched.mechanisms.cuda.pool import Pool
from gpusched.mechanisms.cuda.target import Phase, Refused, Target
from gpusched.ports import Description, DriverApi, DriverState, Obstacle, Usage

log = logging.getLogger(__name__)

#: The gate's part of the time for a lock; a process that needs longer is for the driver's own.
_GATE_S: Final = 5.0
#: Of a parked process, too, the driver knows these better.
_DRIVERS_OWN: Final = (DriverState.CHECKPOINTED, DriverState.CHANGING, DriverState.FAILED)
#: After so long without a move the movers end and spare chunks go back to the host.
_IDLE_S: Final = 60.0

_IMPORTS: Final = (
    "it uses memory of another process (CUDA IPC or imported handles), and the driver does not bring such a process "
    "back; end the sharing first"
)


class DirectDriver:
    """See above. Safe from many threads; one call at a time for a process."""

    def __init__(self, driver: DriverApi, chunks: Pool) -> None:
        self._driver, self.pool = driver, chunks
        self.movers = Movers(chunks.directory)
        self._passage = Passage(driver, chunks, self.movers)
        self._lock = threading.Lock()
        self._moving: set[int] = set()
        self._last: dict[int, Phases] = {}
        self._rest: threading.Timer | None = None

    def close(self) -> None:
        """Ends the movers. What is in the pool stays."""
        with self._lock:
            if self._rest is not None:
                self._rest.cancel()
        self.movers.end()

    def describe(self) -> Description:
        return self._driver.describe()

    def usage(self) -> Usage:
        """What a mover takes counts as free: it makes room where a process needs that."""
        found = self._driver.usage()
        gpus, processes = dict(found.gpus), dict(found.processes)
        for mover in self.movers.all():
            taken = processes.pop(mover.pid or 0, {}).get(mover.gpu, 0)
            if mover.gpu in gpus:
                memory = gpus[mover.gpu]
                gpus[mover.gpu] = replace(
                    memory,
                    used_bytes=memory.used_bytes - taken,
                    free_bytes=memory.free_bytes + taken,
                )
        return Usage(gpus=gpus, processes=processes)

    def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        """The driver's, and what only a look from within a process tells."""
        found = self._driver.obstacles(pids)
        ours = [pid for pid in pids if _imports(pid)]
        return found + [
            Obstacle(pid=pid, kind="ipc", message=_IMPORTS, certain=False) for pid in ours
        ]

    def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        """The driver's, but for what the gate and the pool know better."""
        found: dict[int, DriverState] = {}
        for pid, state in self._driver.states(pids).items():
            with self._lock:
                is_moving = pid in self._moving
            phase = None if state == DriverState.NONE else _phase(pid)
            if is_moving:
                found[pid] = DriverState.CHANGING
            elif phase == Phase.PARKED and (state not in _DRIVERS_OWN or self._is_held(pid, state)):
                found[pid] = DriverState.PARKED
            elif phase == Phase.CLOSED and state == DriverState.RUNNING:
                found[pid] = DriverState.LOCKED
            else:
                found[pid] = state
        return found

    def _is_held(self, pid: int, state: DriverState) -> bool:
        """Whether a checkpointed process still holds memory on the GPU, because its freeze was interrupted."""
        if state != DriverState.CHECKPOINTED or (stat := proc.read_stat(pid)) is None:
            return False
        snapshot = self.pool.find(pid, stat.start_ticks)
        return snapshot is not None and not snapshot.let_go

    def last(self, pid: int) -> Phases:
        """How the last checkpoint or restore of a process went."""
        return self._last.get(pid, Phases())

    # -- moves

    def lock(self, pid: int, timeout_s: float) -> None:
        begun = time.monotonic()
        with contextlib.suppress(errors.DriverError), _find(pid) as target:
            try:
                if target is not None and target.has_pieces():
                    target.close_gate(min(_GATE_S, timeout_s))
                    return
            except (errors.GpuschedError, TimeoutError, Refused) as error:
                log.info("process %d does not come to rest at the gate: %s", pid, error)
        self._driver.lock(pid, max(0.001, timeout_s - (time.monotonic() - begun)))

    def checkpoint(self, pid: int, *, keep_context: bool = False) -> None:
        with self._move(pid) as phases, _find(pid) as target:
            if target is not None and target.phase == Phase.PARKED:
                if not keep_context:
                    self._passage.deepen(target, phases)
                return
            if target is None or target.phase != Phase.CLOSED:
                self._driver.checkpoint(pid)
                return
            self.forget_dead()
            try:
                self._passage.take_out(target, phases, keep_context=keep_context)
            except NotBegun as error:
                log.warning("process %d goes the driver's way: %s", pid, error.__cause__)
                self._trim()  # the driver needs that host memory too
                self._driver.lock(pid, LOCK_S)
                self._driver.checkpoint(pid)

    def restore(self, pid: int, gpu_map: Mapping[str, str] | None) -> None:
        with self._move(pid) as phases, _find(pid) as target:
            if target is None or target.phase != Phase.PARKED:
                self._driver.restore(pid, gpu_map)
            else:
                self._passage.bring_back(target, gpu_map or {}, phases)

    def unlock(self, pid: int) -> None:
        if self._driver.states([pid]).get(pid) == DriverState.LOCKED:
            self._driver.unlock(pid)
        with _find(pid) as target:
            if target is not None and target.phase == Phase.CLOSED:
                target.open_gate()

    def absorb(self, pid: int) -> None:
        with self._move(pid), _find(pid) as target:
            if target is not None and target.phase == Phase.PARKED:
                state = self._driver.states([pid]).get(pid, DriverState.NONE)
                if state != DriverState.CHECKPOINTED or self._is_held(pid, state):
                    raise errors.DriverError(
                        f"process {pid} has something on the GPU still: checkpoint it first",
                        {"pid": pid},
                    )
                self._passage.absorb(target)

    # -- keeping little

    def forget_dead(self) -> None:
        """Gives back the chunks of processes that are no more."""
        for snapshot in self.pool.snapshots():
            stat = proc.read_stat(snapshot.pid)
            if stat is None or stat.start_ticks != snapshot.start_ticks or not stat.is_alive:
                self.pool.release(snapshot.pid, snapshot.start_ticks)

    def _trim(self) -> None:
        gone = self.pool.trim()
        for mover in self.movers.all():
            mover.forget(gone)

    def _go_to_rest(self) -> None:
        with self._lock:
            if self._moving:
                return
        self.forget_dead()
        for mover in self.movers.all():
            mover.end_if_idle()
        self.pool.trim()

    @contextlib.contextmanager
    def _move(self, pid: int) -> Iterator[Phases]:
        phases = Phases()
        with self._lock:
            self._moving.add(pid)
            if self._rest is not None:
                self._rest.cancel()
        try:
            yield phases
        finally:
            with self._lock:
                self._moving.discard(pid)
                self._last[pid] = phases
                self._rest = threading.Timer(_IDLE_S, self._go_to_rest)
                self._rest.daemon = True
                self._rest.start()


@contextlib.contextmanager
def _find(pid: int) -> Iterator[Target | None]:
    target = Target.find(pid)
    if target is None:
        yield None
    else:
        with target:
            yield target


def _phase(pid: int) -> Phase | None:
    try:
        with _find(pid) as target:
            return target.phase if target is not None else None
    except errors.DriverError:
        return None


def _imports(pid: int) -> int:
    try:
        with _find(pid) as target:
            return target.imports if target is not None else 0
    except errors.DriverError:
        return 0
