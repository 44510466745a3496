"""The way of one process's contents past the driver: out to the pool, back, and into the process's own memory.

Covers: the order of the steps on a process that is at rest, and what is tried where one fails. Does not cover: the gate
and the driver's own way (``direct.py``), and each step (``target.py``, ``mover_client.py``, ``pool.py``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from gpusched import errors
from gpusched.mechanisms import proc
from gpusched.mechanisms.cuda import pool
from gpusched.mechanisms.cuda.driver import CONTEXT_BYTES
from gpusched.mechanisms.cuda.mover_client import Mover, Movers
from gpusched.mechanisms.cuda.pool import Pool, Slice, Snapshot
from gpusched.mechanisms.cuda.target import Phase, Piece, Refused, Target
from gpusched.ports import DriverApi, DriverState

log = logging.getLogger(__name__)

#: With the gate closed nobody is in the driver: its lock has nothing to wait for.
LOCK_S: Final = 10.0


@dataclass(slots=True)
class Phases:
    """How the contents went, and how long the parts of it took, in milliseconds."""

    path: str = "driver"
    ms: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.ms[name] = round((time.monotonic() - begun) * 1000, 2)


class NotBegun(Exception):
    """Everything is still where it was; the cause says why it could not be moved."""


class Passage:
    """The steps, over one driver and one pool. Safe from many threads; one call at a time for a process."""

    def __init__(self, driver: DriverApi, chunks: Pool, movers: Movers) -> None:
        self._driver, self._pool, self._movers = driver, chunks, movers

    # -- out --------------------------------------------------------------------------------------

    def take_out(self, target: Target, phases: Phases, *, keep_context: bool) -> None:
        """From a closed gate to parked, and with the driver's checkpoint of the rest beside the copy.

        Not of the rest with ``keep_context``, where that is about a context: what the driver alone can move
        (stream-ordered, managed memory) would stay as well.

        Raises NotBegun; any other error leaves the process parked, with all contents in the pool or held by it. A
        process that may not have a descriptor for each piece cannot hold it: then the copy comes before the rest.
        """
        snapshot, deep = self._begin(target, keep_context=keep_context)
        at_once = deep and target.can_hold(len(snapshot.places))
        has_begun = False
        try:
            with contextlib.ExitStack() as jobs:
                with phases.time("prepare"):
                    movers = self._begin_jobs(jobs, snapshot, snapshot.by_gpu())
                with phases.time("export"):
                    # With the context's checkpoint beside the copy, mapping goes first, which is slow beside a copy;
                    # without, the copy begins with the first pieces.
                    _hand_over(
                        target.export(keep=at_once), snapshot.by_gpu(), movers, and_go=not at_once
                    )
                    _go(movers, out=True)
                if not at_once:
                    self._finish_copy(snapshot, movers, phases)
                has_begun = True
                with phases.time("unmap"):
                    target.park()
                phases.path = "direct"
                if at_once:
                    with ThreadPoolExecutor(1, "copy") as thread:
                        copying = thread.submit(self._finish_copy, snapshot, movers, phases)
                        self._checkpoint_context(target.pid, phases)
                        copying.result()
        except (errors.GpuschedError, OSError, Refused, TimeoutError) as error:
            # A refusal is an answer, so the phase is true; after another error it may yet become another one.
            if has_begun and not (isinstance(error, Refused) and target.phase == Phase.CLOSED):
                raise
            # Not before the movers have ended: they may be copying into chunks that others are given next.
            self._pool.release(target.pid, snapshot.start_ticks)
            # Descriptors keep VRAM alive, and would through the driver's checkpoint that follows.
            with contextlib.suppress(errors.GpuschedError, OSError, Refused):
                target.drop()
            raise NotBegun from error
        self._let_go(target)
        if deep and not at_once:
            self._checkpoint_context(target.pid, phases)

    def _begin(self, target: Target, *, keep_context: bool) -> tuple[Snapshot, bool]:
        """Room for its contents, and whether the rest goes too. Raises NotBegun."""
        try:
            pieces = [(p.place, p.gpu, p.size_bytes) for p in target.pieces()]
            deep = True
            if keep_context:
                there = sum(self._driver.usage().processes.get(target.pid, {}).values())
                deep = there - sum(size for _, _, size in pieces) > CONTEXT_BYTES
            return self._pool.take(target.pid, start_ticks(target.pid), pieces), deep
        except (errors.GpuschedError, OSError, Refused) as error:
            raise NotBegun from error

    def _let_go(self, target: Target) -> None:
        """The copy is complete: the process gives up the descriptors that have kept its memory alive."""
        target.drop()
        self._pool.let_go(target.pid, start_ticks(target.pid))

    def _checkpoint_context(self, pid: int, phases: Phases) -> None:
        with phases.time("context"):
            self._driver.lock(pid, LOCK_S)
            self._driver.checkpoint(pid)

    def deepen(self, target: Target, phases: Phases) -> None:
        """Nothing of a parked process is left on the GPU after it: what an interrupted move has left there goes too.

        Raises GpuschedError, OSError, Refused, TimeoutError; it is parked still.
        """
        phases.path = "direct"
        snapshot = self._pool.find(target.pid, start_ticks(target.pid))
        if snapshot is not None and not snapshot.complete:
            self._take_rest(target, snapshot)
        elif snapshot is not None and not snapshot.let_go:
            self._let_go(target)
        with phases.time("context"):
            if self._state(target) == DriverState.RUNNING:
                target.park()  # also what a thaw that failed had made anew: it has no contents
                self._driver.lock(target.pid, LOCK_S)
            if self._state(target) == DriverState.LOCKED:
                self._driver.checkpoint(target.pid)
        if (state := self._state(target)) != DriverState.CHECKPOINTED:
            raise errors.DriverError(
                f"process {target.pid} is {state} for the driver; it stays frozen",
                {"pid": target.pid},
            )

    def _state(self, target: Target) -> DriverState:
        return self._driver.states([target.pid]).get(target.pid, DriverState.NONE)

    def _begin_jobs(
        self, jobs: contextlib.ExitStack, snapshot: Snapshot, gpus: Mapping[str, object]
    ) -> dict[str, Mover]:
        """In one order for everybody, so that two that need the same movers do not wait for each other."""
        return {gpu: jobs.enter_context(self._movers.of(gpu).job(snapshot)) for gpu in sorted(gpus)}

    def _finish_copy(self, snapshot: Snapshot, movers: Mapping[str, Mover], phases: Phases) -> None:
        with phases.time("copy"):
            for mover in movers.values():
                mover.finish(snapshot.size_bytes)
        self._pool.complete(snapshot)

    # -- back -------------------------------------------------------------------------------------

    def bring_back(self, target: Target, gpu_map: Mapping[str, str], phases: Phases) -> None:
        """From parked to a closed gate. Raises GpuschedError; the process is parked then, and can be tried again.

        Where the mover fails, or has no room beside the process, the process copies for itself.
        """
        if gpu_map:
            self.deepen(target, phases)  # only a restore takes it to another GPU
        snapshot = self._pool.find(target.pid, start_ticks(target.pid))
        # To another GPU it goes by itself: which one its memory is on then, it alone can say.
        if snapshot is not None and not snapshot.absorbed and not gpu_map:
            try:
                self._bring_back_by_mover(target, snapshot, phases)
            except (errors.GpuschedError, OSError, TimeoutError) as error:
                log.warning("process %d copies for itself: %s", target.pid, error)
                for gpu in snapshot.by_gpu():
                    self._movers.of(gpu).end()
            else:
                self._pool.release(target.pid, snapshot.start_ticks)
                return
        self.absorb(target)
        self._bring_back_alone(target, gpu_map, phases)

    def _bring_back_by_mover(self, target: Target, snapshot: Snapshot, phases: Phases) -> None:
        phases.path = "direct"
        if not snapshot.complete:
            self._take_rest(target, snapshot)
        places = snapshot.by_gpu()
        with contextlib.ExitStack() as jobs:
            with phases.time("prepare"):
                movers = self._begin_jobs(jobs, snapshot, places)
                for gpu, mover in movers.items():
                    mover.stage(list(places[gpu].values()))
            with phases.time("context"):
                self._restore_context(target.pid, {})
            with phases.time("create"):
                try:
                    _hand_over(target.create(), places, movers)
                except Refused as error:
                    raise _does_not_fit(target.pid, error) from error
            with phases.time("copy"):
                _go(movers, out=False)
                # It takes longer the more GPUs there are, and needs none of the contents. Where it fails (a library
                # that does not know it, say) that is found and told of below.
                with contextlib.suppress(Refused, TimeoutError):
                    target.map()
                for mover in movers.values():
                    mover.finish(snapshot.size_bytes)
            with phases.time("map"):
                _attach(target)

    def _bring_back_alone(self, target: Target, gpu_map: Mapping[str, str], phases: Phases) -> None:
        """The process copies from its own memory: slower, and without a mover and a pool."""
        phases.path = "own"
        with phases.time("context"):
            self._restore_context(target.pid, gpu_map)
        with phases.time("create"):
            try:
                for _, fds in target.create():
                    _close(fds)
            except Refused as error:
                raise _does_not_fit(target.pid, error) from error
        with phases.time("copy"):
            _attach(target, fill_bytes=max(1, target.shelter[1]))

    def _restore_context(self, pid: int, gpu_map: Mapping[str, str]) -> None:
        state = self._driver.states([pid]).get(pid)
        if state == DriverState.CHECKPOINTED:
            self._driver.restore(pid, gpu_map or None)
            state = DriverState.LOCKED
        if state == DriverState.LOCKED:
            self._driver.unlock(pid)

    def _take_rest(self, target: Target, snapshot: Snapshot) -> None:
        """Somebody died while it was copied out: the process still holds all of its memory."""
        with contextlib.ExitStack() as jobs:
            movers = self._begin_jobs(jobs, snapshot, snapshot.by_gpu())
            _hand_over(target.held(), snapshot.by_gpu(), movers)
            _go(movers, out=True)
            self._finish_copy(snapshot, movers, Phases())
        self._let_go(target)

    # -- into the process -------------------------------------------------------------------------

    def absorb(self, target: Target) -> None:
        """The contents of a parked process go from the pool into its own memory; those that are there stay.

        One chunk after the other, each given back when it is there, so little more host memory is needed than before.
        Raises DriverError, OSError; what was done stays done, and nothing is lost.
        """
        if target.has_absorbed:
            return
        snapshot = self._pool.find(target.pid, start_ticks(target.pid))
        if snapshot is None:
            raise errors.DriverError(
                f"the contents of process {target.pid} are not in the pool", {"pid": target.pid}
            )
        if not snapshot.complete:
            self._take_rest(target, snapshot)
            snapshot = self._pool.find(target.pid, snapshot.start_ticks) or snapshot
        while snapshot.absorbed < len(snapshot.chunks):
            offset = snapshot.absorbed * pool.CHUNK_BYTES
            for data in self._pool.read(snapshot, snapshot.absorbed):
                target.write(offset, data)
                offset += len(data)
            for mover in self._movers.all():
                mover.forget([snapshot.chunks[snapshot.absorbed]])
            snapshot = self._pool.absorbed(snapshot)
        target.note_absorbed()
        self._pool.release(target.pid, snapshot.start_ticks)


def start_ticks(pid: int) -> int:
    """Raises DriverError where the process is gone."""
    stat = proc.read_stat(pid)
    if stat is None:
        raise errors.DriverError(f"process {pid} is gone", {"pid": pid})
    return stat.start_ticks


def _hand_over(
    batches: Iterator[tuple[list[Piece], list[int]]],
    by_gpu: Mapping[str, Mapping[int, list[Slice]]],
    movers: Mapping[str, Mover],
    *,
    and_go: bool = False,
) -> None:
    """Gives each mover the memory that is on its GPU, while the process hands it out; ``and_go``: to copy at once."""
    left = {place for places in by_gpu.values() for place in places}
    for pieces, fds in batches:
        try:
            if len(fds) != len(pieces):
                raise errors.DriverError("the process did not hand over its memory")
            left -= {piece.place for piece in pieces}
            for gpu, places in by_gpu.items():
                mine = [(p, fd) for p, fd in zip(pieces, fds, strict=True) if p.place in places]
                if mine:
                    movers[gpu].take([places[p.place] for p, _ in mine], [fd for _, fd in mine])
                    if and_go:
                        movers[gpu].go(out=True)
        finally:
            _close(fds)
    if left:
        raise errors.DriverError(f"the process handed over all but {len(left)} pieces of memory")


def _go(movers: Mapping[str, Mover], *, out: bool) -> None:
    for mover in movers.values():
        mover.go(out=out)


def _attach(target: Target, *, fill_bytes: int = 0) -> None:
    try:
        target.attach(fill_bytes=fill_bytes)
    except Refused as error:
        raise errors.DriverError(
            f"process {target.pid} could not map its memory again ({error}); it stays frozen",
            {"call": "attach", "pid": target.pid},
        ) from error


def _does_not_fit(pid: int, error: Refused) -> errors.InsufficientGpuMemory:
    return errors.InsufficientGpuMemory(
        f"process {pid} did not fit when its memory was made anew ({error}); it stays frozen"
    )


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
