"""The driver's calls, with the contents of VRAM taken past it at the speed of the bus where a process allows it.

``ports.DriverApi`` around another one. A process that has ``libgpusched_direct`` in it is brought to rest by its gate;
its memory is handed to the mover of its GPU as descriptors, copied into the pool while the driver checkpoints the small
rest, and made anew on the way back. Everything else goes to the driver, and so does such a process where this way fails
before its memory has left.

    lock        close the gate                               (else the driver's lock)
    checkpoint  export, copy || unmap, the driver's lock and checkpoint; the process holds on to its memory by
                descriptors until the copy is complete
    restore     the driver's restore and unlock; make memory, copy, map
    unlock      open the gate; the pool gets its chunks back

What is true is asked anew each time: the phase from the process's page, the driver's state, the pool's manifests. So
every call can be repeated after a crash of anybody, and goes on from where things are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.cuda import pool
from gpusched.mechanisms.cuda.mover_client import Mover, Movers
from gpusched.mechanisms.cuda.pool import Pool, Slice, Snapshot
from gpusched.mechanisms.cuda.target import Phase, Piece, Refused, Target
from gpusched.ports import Description, DriverApi, DriverState, Obstacle, Usage

log = logging.getLogger(__name__)

#: The gate's part of the time for a lock; a process that needs longer is for the driver's own.
_GATE_S: Final = 5.0
#: With the gate closed nobody is in the driver: its lock has nothing to wait for.
_LOCK_S: Final = 10.0


@dataclass(slots=True)
class Phases:
    """How long the parts of one move took, in milliseconds."""

    path: str = "driver"
    ms: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.ms[name] = round((time.monotonic() - begun) * 1000, 2)


class DirectDriver:
    """See above. Safe from many threads; one call at a time for a process."""

    def __init__(self, driver: DriverApi, chunks: Pool) -> None:
        self._driver, self.pool = driver, chunks
        self.movers = Movers(chunks.directory)
        self._lock = threading.Lock()
        self._moving: set[int] = set()
        self._last: dict[int, Phases] = {}

    def close(self) -> None:
        """Ends the movers. What is in the pool stays."""
        self.movers.end()

    def forget_dead(self) -> None:
        """Gives back the chunks of processes that are no more."""
        for snapshot in self.pool.snapshots():
            stat = proc.read_stat(snapshot.pid)
            if stat is None or stat.start_ticks != snapshot.start_ticks or not stat.is_alive:
                self.pool.release(snapshot.pid, snapshot.start_ticks)

    def describe(self) -> Description:
        return self._driver.describe()

    def usage(self) -> Usage:
        return self._driver.usage()

    def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        return self._driver.obstacles(pids)

    def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        """The driver's, but for what the gate and the pool know better."""
        found: dict[int, DriverState] = {}
        for pid, state in self._driver.states(pids).items():
            with self._lock:
                moving = pid in self._moving
            phase = None if state == DriverState.NONE else _phase(pid)
            if moving:
                found[pid] = DriverState.CHANGING
            elif phase == Phase.PARKED:
                found[pid] = DriverState.CHECKPOINTED
            elif phase == Phase.CLOSED and state == DriverState.RUNNING:
                found[pid] = DriverState.LOCKED
            else:
                found[pid] = state
        return found

    def last(self, pid: int) -> Phases:
        """How the last checkpoint or restore of a process went."""
        return self._last.get(pid, Phases())

    # -- moves

    def lock(self, pid: int, timeout_s: float) -> None:
        begun = time.monotonic()
        with _find(pid) as target:
            try:
                if target is not None and target.pieces():
                    target.close_gate(min(_GATE_S, timeout_s))
                    return
            except (errors.GpuschedError, TimeoutError, Refused) as error:
                log.info("process %d does not come to rest at the gate: %s", pid, error)
        self._driver.lock(pid, max(0.001, timeout_s - (time.monotonic() - begun)))

    def checkpoint(self, pid: int, *, keep_context: bool = False) -> None:
        with self._move(pid) as phases, _find(pid) as target:
            if target is None or target.phase != Phase.CLOSED:
                self._driver.checkpoint(pid)
                return
            try:
                self._take_out(target, phases, deep=not keep_context)
            except _NotBegun as error:
                log.warning("process %d goes the driver's way: %s", pid, error.__cause__)
                self._driver.lock(pid, _LOCK_S)
                self._driver.checkpoint(pid)

    def restore(self, pid: int, gpu_map: Mapping[str, str] | None) -> None:
        with self._move(pid) as phases, _find(pid) as target:
            if target is None or target.phase != Phase.PARKED:
                self._driver.restore(pid, gpu_map)
            else:
                self._bring_back(target, gpu_map or {}, phases)

    def unlock(self, pid: int) -> None:
        if self._driver.states([pid]).get(pid) == DriverState.LOCKED:
            self._driver.unlock(pid)
        with _find(pid) as target:
            if target is not None and target.phase == Phase.CLOSED:
                target.open_gate()
        self.pool.release(pid, _start_ticks(pid))

    def absorb(self, pid: int) -> None:
        """Puts the contents into the process's own memory, where CRIU finds them. Works on a stopped process.

        One chunk after the other, each given back when it is there, so little more host memory is needed than before.
        Does nothing for a process whose contents are not in the pool. Raises DriverError; what was done stays done,
        and nothing is lost.
        """
        with self._move(pid), _find(pid) as target:
            if target is None or target.phase != Phase.PARKED or target.has_absorbed:
                return
            self._absorb(target)

    def _absorb(self, target: Target) -> None:
        snapshot = self._snapshot(target.pid)
        if not snapshot.complete:
            raise errors.DriverError(
                f"the contents of process {target.pid} are still on their way", {"pid": target.pid}
            )
        while snapshot.absorbed < len(snapshot.chunks):
            offset = snapshot.absorbed * pool.CHUNK_BYTES
            for data in self.pool.read(snapshot, snapshot.absorbed):
                target.write(offset, data)
                offset += len(data)
            for mover in self.movers.all():
                mover.forget([snapshot.chunks[snapshot.absorbed]])
            snapshot = self.pool.absorbed(snapshot)
        target.has_all()
        self.pool.release(target.pid, snapshot.start_ticks)

    def _snapshot(self, pid: int) -> Snapshot:
        found = self.pool.find(pid, _start_ticks(pid))
        if found is None:
            raise errors.DriverError(
                f"the contents of process {pid} are not in the pool", {"pid": pid}
            )
        return found

    # -- out

    def _take_out(self, target: Target, phases: Phases, *, deep: bool) -> None:
        pid = target.pid
        try:
            pieces = target.pieces()
            snapshot = self.pool.take(
                pid, _start_ticks(pid), _uid(pid), [piece.size_bytes for piece in pieces]
            )
        except (errors.GpuschedError, OSError, Refused) as error:
            raise _NotBegun from error
        by_gpu = _by_gpu(pieces, snapshot)
        with contextlib.ExitStack() as jobs:
            movers = {}
            try:
                with phases.time("prepare"):
                    for gpu in by_gpu:
                        movers[gpu] = jobs.enter_context(self.movers.of(gpu).job(snapshot))
                with phases.time("export"):
                    _hand_over(target.export(), by_gpu, movers)
                    for mover in movers.values():
                        mover.go(out=True)
                if not deep:
                    with phases.time("copy"):
                        for mover in movers.values():
                            mover.finish(snapshot.size_bytes)
                    self.pool.complete(snapshot)
            except (errors.GpuschedError, OSError, Refused, TimeoutError) as error:
                self.pool.release(pid, snapshot.start_ticks)
                raise _NotBegun from error
            with phases.time("unmap"):
                target.park()
            phases.path = "direct"
            if deep:
                self._copy_beside_checkpoint(target, snapshot, list(movers.values()), phases)
            target.drop()

    def _copy_beside_checkpoint(
        self, target: Target, snapshot: Snapshot, movers: Sequence[Mover], phases: Phases
    ) -> None:
        def copied() -> None:
            with phases.time("copy"):
                for mover in movers:
                    mover.finish(snapshot.size_bytes)
            self.pool.complete(snapshot)

        with ThreadPoolExecutor(1, "copy") as thread:
            copying = thread.submit(copied)
            with phases.time("context"):
                self._driver.lock(target.pid, _LOCK_S)
                self._driver.checkpoint(target.pid)
            copying.result()

    # -- back

    def _bring_back(self, target: Target, gpu_map: Mapping[str, str], phases: Phases) -> None:
        pid = target.pid
        if target.has_absorbed:
            self._bring_back_alone(target, gpu_map, phases)
            return
        snapshot = self._snapshot(pid)
        if snapshot.absorbed:
            self._absorb(target)
            self._bring_back_alone(target, gpu_map, phases)
            return
        phases.path = "direct"
        by_gpu = _by_gpu(target.pieces(), snapshot)
        if not snapshot.complete:
            self._take_rest(target, snapshot, by_gpu)
        new = {gpu_map.get(gpu, gpu): places for gpu, places in by_gpu.items()}
        with contextlib.ExitStack() as jobs:
            with phases.time("prepare"):
                movers = {gpu: jobs.enter_context(self.movers.of(gpu).job(snapshot)) for gpu in new}
                for gpu, mover in movers.items():
                    mover.stage(list(new[gpu].values()))
            with phases.time("context"):
                self._restore_context(pid, gpu_map)
            try:
                with phases.time("create"):
                    _hand_over(target.create(), new, movers)
            except Refused as error:
                raise _does_not_fit(pid, error) from error
            with phases.time("copy"):
                for mover in movers.values():
                    mover.go(out=False)
                for mover in movers.values():
                    mover.finish(snapshot.size_bytes)
            with phases.time("map"):
                target.attach()

    def _bring_back_alone(self, target: Target, gpu_map: Mapping[str, str], phases: Phases) -> None:
        """The process copies from its own memory: slower, and without a mover and a pool."""
        phases.path = "own"
        with phases.time("context"):
            self._restore_context(target.pid, gpu_map)
        try:
            with phases.time("create"):
                for _, fds in target.create():
                    _close(fds)
        except Refused as error:
            raise _does_not_fit(target.pid, error) from error
        with phases.time("copy"):
            target.attach(fill_bytes=max(1, target.shelter[1]))

    def _restore_context(self, pid: int, gpu_map: Mapping[str, str]) -> None:
        state = self._driver.states([pid]).get(pid)
        if state == DriverState.CHECKPOINTED:
            self._driver.restore(pid, gpu_map or None)
            state = DriverState.LOCKED
        if state == DriverState.LOCKED:
            self._driver.unlock(pid)

    def _take_rest(
        self,
        target: Target,
        snapshot: Snapshot,
        by_gpu: Mapping[str, Mapping[int, list[Slice]]],
    ) -> None:
        """Somebody died while it was copied out: the process still holds all of its memory."""
        with contextlib.ExitStack() as jobs:
            movers = {gpu: jobs.enter_context(self.movers.of(gpu).job(snapshot)) for gpu in by_gpu}
            _hand_over(target.held(), by_gpu, movers)
            for mover in movers.values():
                mover.go(out=True)
            for mover in movers.values():
                mover.finish(snapshot.size_bytes)
        self.pool.complete(snapshot)
        target.drop()

    @contextlib.contextmanager
    def _move(self, pid: int) -> Iterator[Phases]:
        phases = Phases()
        with self._lock:
            self._moving.add(pid)
        try:
            yield phases
        finally:
            with self._lock:
                self._moving.discard(pid)
                self._last[pid] = phases


class _NotBegun(Exception):
    """Everything is still where it was; the cause says why it could not be moved."""


def _hand_over(
    batches: Iterator[tuple[list[Piece], list[int]]],
    by_gpu: Mapping[str, Mapping[int, list[Slice]]],
    movers: Mapping[str, Mover],
) -> None:
    """Gives each mover the memory that is on its GPU, while the process hands it out."""
    for pieces, fds in batches:
        try:
            if len(fds) != len(pieces):
                raise errors.DriverError("the process did not hand over its memory")
            for gpu, places in by_gpu.items():
                mine = [(p, fd) for p, fd in zip(pieces, fds, strict=True) if p.place in places]
                if mine:
                    movers[gpu].take([places[p.place] for p, _ in mine], [fd for _, fd in mine])
        finally:
            _close(fds)


def _by_gpu(pieces: Sequence[Piece], snapshot: Snapshot) -> dict[str, dict[int, list[Slice]]]:
    """UUID -> place -> where its contents are in the pool. Raises DriverError where it is not what was taken."""
    if [p.size_bytes for p in pieces] != list(snapshot.sizes):
        raise errors.DriverError(
            f"process {snapshot.pid} has other memory than what was taken from it"
        )
    found: dict[str, dict[int, list[Slice]]] = {}
    for piece, slices in zip(pieces, snapshot.slices(), strict=True):
        found.setdefault(piece.gpu, {})[piece.place] = slices
    return found


@contextlib.contextmanager
def _find(pid: int) -> Iterator[Target | None]:
    target = Target.find(pid)
    if target is None:
        yield None
    else:
        with target:
            yield target


def _phase(pid: int) -> Phase | None:
    with _find(pid) as target:
        return target.phase if target is not None else None


def _start_ticks(pid: int) -> int:
    stat = proc.read_stat(pid)
    if stat is None:
        raise errors.DriverError(f"process {pid} is gone", {"pid": pid})
    return stat.start_ticks


def _uid(pid: int) -> int:
    return proc.ruid(pid) or 0


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _does_not_fit(pid: int, error: Refused) -> errors.InsufficientGpuMemory:
    return errors.InsufficientGpuMemory(
        f"process {pid} did not fit when its memory was made anew ({error}); it stays frozen"
    )
