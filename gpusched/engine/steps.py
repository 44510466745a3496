"""The steps of a move, performed on one tree: see ``domain/moves.py`` for which, ``moves.py`` for when.

Every step works on what the driver says now and skips members that are already there. So a step may be repeated, an
undo mends a step that failed half-way, and recovery uses the same code for what another daemon left behind.

After a step raised, the driver is asked: when it says that the step was done after all, the move goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from gpusched import errors
from gpusched.domain.capacity import add, remap
from gpusched.domain.moves import Op
from gpusched.domain.placement import onward
from gpusched.engine.model import Tree
from gpusched.ports import OFF_GPU, Clock, Driver, DriverState, Member, Took, Trees, Usage
from gpusched.units import GIB, format_size

log = logging.getLogger(__name__)

#: Rescans of a tree that keeps growing while it is locked or stopped.
MAX_ROUNDS: Final = 20
#: How long a stopped process may take to show as stopped (it may be in an uninterruptible wait).
STOP_TIMEOUT_S: Final = 5.0
#: So long it is looked at without a pause.
STOP_SPIN_S: Final = 0.001
#: How long the driver may take to leave a changing state that somebody else caused.
SETTLE_TIMEOUT_S: Final = 120.0
#: A frozen tree is the largest thing in host RAM and does nothing: the OOM killer's favourite. Protect it.
FROZEN_OOM_SCORE: Final = -900

_S = DriverState


def deadline_for(size_bytes: int) -> float:
    """Seconds that a checkpoint or restore may take: a minute, and a tenth of the slowest rate seen (1.8 GB/s)."""
    return 60.0 + size_bytes / (0.18 * GIB)


@dataclass(frozen=True, slots=True)
class Ground:
    """What the steps of all trees work with."""

    driver: Driver
    trees: Trees
    clock: Clock
    lock_timeout_s: float

    async def settle(self, tree: Tree) -> tuple[list[Member], dict[int, DriverState]]:
        """The members of a tree and their driver states, once no driver call is under way on any of them.

        Raises DeadlineExceeded when that does not happen.
        """
        patience_s = max(SETTLE_TIMEOUT_S, deadline_for(sum(tree.vram.values())))
        deadline = self.clock.monotonic_s() + patience_s
        while True:
            members = await self.trees.members(tree.tree_id, tree.main)
            states = await self.driver.states([m.pid for m in members])
            if _S.CHANGING not in states.values():
                return members, states
            if self.clock.monotonic_s() > deadline:
                raise errors.DeadlineExceeded(
                    f"the driver has been changing the state of {tree.tree_id} for {patience_s:.0f} s"
                )
            await asyncio.sleep(0.05)


class Work:
    """One pass over one tree."""

    def __init__(
        self,
        ground: Ground,
        tree: Tree,
        gpu_map: Mapping[str, str] | None = None,
        *,
        keep_context: bool = False,
        is_undo: bool = False,
    ) -> None:
        self._ground = ground
        self._driver = ground.driver
        self._trees = ground.trees
        self._tree = tree
        self._gpu_map = gpu_map
        #: Whether members may keep their contexts on the GPU, where the driver can do that.
        self._keep_context = keep_context
        #: What counts as off the GPU. An undo goes as deep as it can, and is content with less.
        self._off = OFF_GPU if keep_context or is_undo else frozenset({_S.CHECKPOINTED})
        self._deadline_s = deadline_for(sum(tree.vram.values()))
        self.phases_ms: dict[str, float] = {}
        self.driver_ms = 0.0
        self.oom_scores: dict[int, int] | None = None
        self.moved = dict(tree.moved)
        #: VRAM of members that had none, or were not there, when the others were checkpointed.
        self.late: dict[str, int] = {}
        #: States that the driver has just confirmed by doing what we asked: not asked for again before ``verify``.
        self._told: dict[int, DriverState] = {}

    def left_behind(self) -> Tree:
        """The tree as this pass leaves it, for the one that takes it back."""
        scores = self._tree.oom_scores if self.oom_scores is None else self.oom_scores
        return replace(self._tree, moved=self.moved, oom_scores=scores)

    async def perform(self, op: Op) -> errors.GpuschedError | None:
        """One step; what it raised is returned, unless the driver says that the step was done all the same."""
        started = self._ground.clock.monotonic_s()
        try:
            await _STEPS[op](self)
        except errors.GpuschedError as error:
            return await self._explain(op, error)
        finally:
            self._spent(op, started)
        return None

    def _spent(self, phase: str, started_s: float) -> None:
        spent = (self._ground.clock.monotonic_s() - started_s) * 1000
        self.phases_ms[phase] = round(self.phases_ms.get(phase, 0.0) + spent, 2)

    async def verify(self, *, frozen: bool) -> errors.GpuschedError | None:
        """Asks the driver and /proc whether the tree is off the GPU, or on it; returns what is wrong."""
        started = self._ground.clock.monotonic_s()
        try:
            members, states = await self._ground.settle(self._tree)
        except errors.GpuschedError as error:
            return error
        finally:
            self._spent("verify", started)
        if not members:
            return self._gone()
        wanted = self._off if frozen else {_S.RUNNING}
        wrong = {
            m.pid: states.get(m.pid, _S.NONE)
            for m in members
            if states.get(m.pid, _S.NONE) not in {*wanted, _S.NONE}
        }
        if wrong:
            return self._wrong_state(wrong, f"to be {' or '.join(sorted(wanted))}")
        astray = [m.pid for m in members if m.stopped is not frozen]
        if astray and self._tree.stop:
            should = "stop" if frozen else "continue"
            return errors.DriverError(f"pids {astray} did not {should}", {"pids": astray})
        return None

    async def held(self) -> dict[str, int]:
        """VRAM that the members take at this moment, in bytes for each GPU."""
        members = await self._trees.members(self._tree.tree_id, self._tree.main)
        return _held_by(members, await self._driver.usage())

    # -- the steps --------------------------------------------------------------------------------

    async def _lock(self) -> None:
        """Locks every member with CUDA state, and those that appear meanwhile, until none is left."""
        for _ in range(MAX_ROUNDS):
            _, states = await self._look()
            running = [pid for pid, state in states.items() if state is _S.RUNNING]
            if not running:
                return
            timeout_s = self._ground.lock_timeout_s
            await self._all({p: self._driver.lock(p, timeout_s) for p in running}, _S.LOCKED)
        raise errors.LockTimeout(
            "the process keeps starting CUDA processes faster than they can be locked; try again later"
        )

    async def _unlock(self) -> None:
        _, states = await self._look()
        locked = [pid for pid, state in states.items() if state is _S.LOCKED]
        await self._all({p: self._driver.unlock(p) for p in locked}, _S.RUNNING)

    async def _checkpoint(self) -> None:
        """Also of what only its context is left on the GPU, unless that may stay."""
        _, states = await self._look()
        before = {_S.LOCKED} if self._keep_context else {_S.LOCKED, _S.PARKED}
        calls = {
            pid: self._driver.checkpoint(pid, self._deadline_s, keep_context=self._keep_context)
            for pid, state in states.items()
            if state in before
        }
        await self._all(calls, None if self._keep_context else _S.CHECKPOINTED)

    async def _restore(self) -> None:
        """Onto the asked GPUs, or home: also for members that a migration had taken elsewhere before it failed."""
        _, states = await self._look()
        if not set(states.values()) & {
            _S.RUNNING,
            _S.LOCKED,
        }:  # else some of the room is the tree's already
            await self._require_room()
        maps = {
            pid: onward(self.moved.get(pid), self._gpu_map)
            for pid, state in states.items()
            if state in OFF_GPU
        }
        try:
            calls = {p: self._driver.restore(p, m, self._deadline_s) for p, m in maps.items()}
            await self._all(calls, _S.LOCKED)
        finally:
            if any(maps.values()):
                await self._note_moved(maps)

    async def _require_room(self) -> None:
        """A restore that does not fit is never tried: on some drivers it loses the process."""
        usage = await self._driver.usage()
        members = await self._trees.members(self._tree.tree_id, self._tree.main)
        there = _held_by(members, usage)  # contexts that have stayed
        for uuid, size in remap(self._tree.vram, self._gpu_map).items():
            if uuid not in usage.gpus:
                continue
            free = usage.gpus[uuid].free_bytes + there.get(uuid, 0)
            if free < size:
                raise errors.InsufficientGpuMemory(
                    f"it needs {format_size(size)} on {uuid}, and somebody took that: {format_size(free)} "
                    "is free; thaw it when there is room",
                    {"gpu": uuid, "need_bytes": size, "free_bytes": free},
                )

    async def _note_moved(self, tried: Iterable[int]) -> None:
        """Remembers who lies where now, whatever the calls said."""
        with contextlib.suppress(errors.GpuschedError):
            _, states = await self._ground.settle(self._tree)
            for pid in tried:
                if states.get(pid) in (_S.LOCKED, _S.RUNNING):
                    self.moved.pop(pid, None)
                    if self._gpu_map is not None:
                        self.moved[pid] = dict(self._gpu_map)

    async def _stop(self) -> None:
        """Stops every member, unless the tree is to run on. One that got CUDA state since the lock is continued,
        locked and checkpointed first.
        """
        begun = self._ground.clock.monotonic_s()
        pause = 0.001
        running: list[Member] = []
        for _ in range(MAX_ROUNDS * 100):
            members = await self._trees.members(self._tree.tree_id, self._tree.main)
            running = [m for m in members if self._tree.stop and not m.stopped]
            if foreign := [m.pid for m in running if self._tree.uid not in (0, m.ruid)]:
                raise errors.PermissionDenied(
                    f"pids {foreign} have become another user's meanwhile"
                )
            if running:
                await self._trees.signal(running, signal.SIGSTOP)
                now = self._ground.clock.monotonic_s()
                if now > begun + STOP_TIMEOUT_S:
                    break
                # A signal takes a fraction of a millisecond, and the shortest sleep of an event loop a whole one.
                if now < begun + STOP_SPIN_S:
                    await asyncio.sleep(0)
                    continue
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.02)
                continue
            states = await self._driver.states(
                [m.pid for m in members if self._told.get(m.pid) is not _S.CHECKPOINTED]
            )
            # Stopped with VRAM, a process is UNKNOWN to the real driver: it can be asked when it runs.
            late = [m for m in members if states.get(m.pid) in (_S.RUNNING, _S.LOCKED, _S.UNKNOWN)]
            if not late:
                old = await self._trees.set_oom_score(members, FROZEN_OOM_SCORE)
                self.oom_scores = {**old, **self._tree.oom_scores}
                return
            self.late = add(self.late, _held_by(late, await self._driver.usage()))
            await self._trees.signal(late, signal.SIGCONT)
            await self._lock()
            await self._checkpoint()
            begun = self._ground.clock.monotonic_s()
        raise errors.DriverError(
            f"pids {[m.pid for m in running]} did not stop within {STOP_TIMEOUT_S:.0f} s"
        )

    async def _continue_kept(self) -> None:
        members = await self._trees.members(self._tree.tree_id, self._tree.main)
        states = await self._driver.states([m.pid for m in members])
        parked = [m for m in members if m.stopped and states.get(m.pid) is _S.PARKED]
        await self._trees.signal(parked, signal.SIGCONT)

    async def _continue(self) -> None:
        members = await self._trees.members(self._tree.tree_id, self._tree.main)
        if not members:
            raise self._gone()
        scores = self._tree.oom_scores if self.oom_scores is None else self.oom_scores
        if scores:
            usual = scores.get(self._tree.main.pid, 0)  # of those born while it was frozen
            wanted = {m.pid: scores.get(m.pid, usual) for m in members}
            await self._trees.set_oom_score(members, wanted)
        for _ in range(MAX_ROUNDS):
            stopped = [m for m in members if m.stopped]
            if not stopped:
                self.oom_scores = {}
                return
            await self._trees.signal(stopped, signal.SIGCONT)
            members = await self._trees.members(self._tree.tree_id, self._tree.main)

    # -- their parts ------------------------------------------------------------------------------

    async def _look(self) -> tuple[list[Member], dict[int, DriverState]]:
        """The members and their states; the driver is asked about those that it has not just told of."""
        members = await self._trees.members(self._tree.tree_id, self._tree.main)
        states = {m.pid: self._told[m.pid] for m in members if m.pid in self._told}
        if len(states) < len(members) or not members:
            members, asked = await self._ground.settle(self._tree)
            states = asked | states
        if not members:
            raise self._gone()
        failed = {pid: s for pid, s in states.items() if s in (_S.FAILED, _S.UNKNOWN)}
        if failed:
            raise self._wrong_state(failed, "to be usable")
        return members, states

    async def _all(
        self, calls: Mapping[int, Awaitable[float]], becomes: DriverState | None
    ) -> None:
        """Waits for all of them, so that none is under way afterwards; then raises the first error.

        ``becomes``: what each process is then; None where only the driver can say.
        """
        results = await asyncio.gather(*calls.values(), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                self._told.clear()
                raise result
        for pid in calls:
            if becomes is None:
                self._told.pop(pid, None)
            else:
                self._told[pid] = becomes
        for took in (r for r in results if isinstance(r, Took)):
            for (
                phase,
                spent_ms,
            ) in took.phases_ms.items():  # of several at the same time the longest
                self.phases_ms[phase] = max(self.phases_ms.get(phase, 0.0), spent_ms)
        seconds = [r for r in results if isinstance(r, float)]
        self.driver_ms += max(seconds, default=0.0) * 1000

    async def _explain(self, op: Op, error: errors.GpuschedError) -> errors.GpuschedError | None:
        """None when ``op`` was done in spite of ``error``; else the error, as precise as it can be."""
        goals = {
            Op.LOCK: {_S.LOCKED, *OFF_GPU},
            Op.CHECKPOINT: self._off,
            Op.RESTORE: {_S.LOCKED, _S.RUNNING},
            Op.UNLOCK: {_S.RUNNING},
        }
        try:
            members, states = await self._ground.settle(self._tree)
        except errors.GpuschedError:
            return error
        if not members:
            return self._gone()
        with_cuda = {s for s in states.values() if s is not _S.NONE}
        if op in goals and with_cuda and with_cuda <= goals[op]:
            log.warning("%s of %s reported %s but is done", op, self._tree.tree_id, error)
            return None
        return error

    def _gone(self) -> errors.ProcessExited:
        return errors.ProcessExited("the process ended in the middle of the operation")

    def _wrong_state(self, states: Mapping[int, DriverState], wanted: str) -> errors.DriverError:
        listed = ", ".join(f"pid {pid} is {state}" for pid, state in states.items())
        return errors.DriverError(
            f"the driver says {listed}; expected {wanted}", {"states": dict(states)}
        )


def _held_by(members: Iterable[Member], usage: Usage) -> dict[str, int]:
    return add(*(usage.processes.get(m.pid, {}) for m in members))


#: Beside the class: a table of bound methods in each object would be garbage that only a full collection finds.
_STEPS: Final[Mapping[Op, Callable[[Work], Awaitable[None]]]] = {
    Op.LOCK: Work._lock,
    Op.UNLOCK: Work._unlock,
    Op.CHECKPOINT: Work._checkpoint,
    Op.RESTORE: Work._restore,
    Op.STOP: Work._stop,
    Op.CONTINUE: Work._continue,
    Op.CONTINUE_KEPT: Work._continue_kept,
}
