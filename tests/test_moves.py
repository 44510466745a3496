"""Moves and recovery on scripted ports: the scores that the kernel's OOM killer is left with, and who cannot be asked.

Here and not with real processes, because lowering a score needs a capability that few test machines give, and because
the simulated driver, unlike a real one, answers for stopped processes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import pytest

from gpusched import errors
from gpusched.domain.moves import Move, Outcome
from gpusched.domain.states import ProcState
from gpusched.engine.model import Process, Tree
from gpusched.engine.moves import Mover
from gpusched.engine.recovery import Recovery, Remembered
from gpusched.engine.steps import FROZEN_OOM_SCORE
from gpusched.mechanisms.clock import SystemClock
from gpusched.ports import (
    Description,
    DriverState,
    GpuMemory,
    Identity,
    Image,
    Launch,
    Member,
    Obstacle,
    Usage,
)

MAIN, CHILD = 100, 101
OWN_SCORES = {MAIN: 0, CHILD: 300}
HOLDING = (DriverState.RUNNING, DriverState.LOCKED)


class World:
    """Two CUDA processes of one tree, and a driver whose calls named in ``failing`` fail once each."""

    def __init__(self) -> None:
        self.scores = dict(OWN_SCORES)
        self.stopped = {MAIN: False, CHILD: False}
        self.states_of = dict.fromkeys(OWN_SCORES, DriverState.RUNNING)
        self.failing: list[str] = []

    def _fail(self, call: str) -> None:
        if call in self.failing:
            self.failing.remove(call)
            raise errors.DriverError(f"{call} failed")

    # -- ports.Driver

    async def describe(self) -> Description:
        raise AssertionError("not asked")

    async def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        raise AssertionError("not asked")

    async def usage(self) -> Usage:
        return Usage(gpus={"GPU-0": GpuMemory(total_bytes=10, used_bytes=0, free_bytes=10)})

    async def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        """As a real driver answers: a process that is stopped with VRAM cannot be asked."""
        return {
            pid: DriverState.UNKNOWN if self.stopped[pid] and state in HOLDING else state
            for pid, state in self.states_of.items()
            if pid in pids
        }

    async def lock(self, pid: int, timeout_s: float) -> float:
        self._fail("lock")
        self.states_of[pid] = DriverState.LOCKED
        return 0.0

    async def checkpoint(self, pid: int, deadline_s: float, *, keep_context: bool = False) -> float:
        self._fail("checkpoint")
        self.states_of[pid] = DriverState.PARKED if keep_context else DriverState.CHECKPOINTED
        return 0.0

    async def restore(
        self, pid: int, gpu_map: Mapping[str, str] | None, deadline_s: float
    ) -> float:
        self._fail("restore")
        self.states_of[pid] = DriverState.LOCKED
        return 0.0

    async def unlock(self, pid: int) -> float:
        self._fail("unlock")
        self.states_of[pid] = DriverState.RUNNING
        return 0.0

    # -- ports.Trees, as far as moves need it

    async def members(self, tree_id: str, main: Identity) -> list[Member]:
        return [
            Member(pid=pid, start_ticks=1, ruid=0, stopped=stopped)
            for pid, stopped in self.stopped.items()
        ]

    async def signal(self, members: Sequence[Member], signal: int) -> None:
        import signal as signals

        for member in members:
            self.stopped[member.pid] = signal == signals.SIGSTOP

    async def set_oom_score(
        self, members: Sequence[Member], score: int | Mapping[int, int]
    ) -> dict[int, int]:
        old = {}
        for member in members:
            wanted = score if isinstance(score, int) else score.get(member.pid)
            if wanted is not None:
                old[member.pid] = self.scores[member.pid]
                self.scores[member.pid] = wanted
        return old

    async def launch(self, launch: Launch) -> Identity:
        raise AssertionError("not asked")

    # -- and as far as recovery does

    async def forget_all_but(self, known: Container[str]) -> None:
        pass  # no files here

    async def leftovers(self) -> list[tuple[str, Launch, Identity]]:
        return []

    async def is_alive(self, identity: Identity) -> bool:
        return True

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"moves do not call {name}")


TREE = Tree(
    tree_id="t",
    main=Identity(pid=MAIN, start_ticks=1, boot_id="b"),
    vram={"GPU-0": 1},
    oom_scores={},
    moved={},
)


@pytest.mark.parametrize("failing", [[], ["lock"], ["checkpoint"], ["checkpoint", "restore"]])
async def test_a_freeze_protects_the_tree_or_leaves_its_scores(failing: list[str]) -> None:
    world = World()
    world.failing = list(failing)
    mover = Mover(world, world, SystemClock(), 1.0)  # type: ignore[arg-type]
    report = await mover.run(TREE, Move.FREEZE)
    if failing:
        assert report.outcome is Outcome.ROLLED_BACK
        assert world.scores == OWN_SCORES
        assert not report.oom_scores
    else:
        assert report.outcome is Outcome.DONE
        assert set(world.scores.values()) == {FROZEN_OOM_SCORE}
        assert report.oom_scores == OWN_SCORES


@pytest.mark.parametrize("failing", [[], ["restore"], ["unlock"], ["restore", "checkpoint"]])
async def test_a_thaw_puts_the_scores_back_or_keeps_the_tree_protected(failing: list[str]) -> None:
    world = World()
    mover = Mover(world, world, SystemClock(), 1.0)  # type: ignore[arg-type]
    frozen = await mover.run(TREE, Move.FREEZE)
    assert frozen.oom_scores is not None
    world.failing = list(failing)
    report = await mover.run(replace(TREE, oom_scores=frozen.oom_scores), Move.THAW)
    if failing:
        assert report.outcome is Outcome.ROLLED_BACK
        assert set(world.scores.values()) == {FROZEN_OOM_SCORE}
        assert report.oom_scores == OWN_SCORES, "what the next thaw is to put back"
    else:
        assert report.outcome is Outcome.DONE
        assert world.scores == OWN_SCORES
        assert report.oom_scores == {}


async def test_a_freeze_that_is_undone_after_the_stop_puts_the_scores_back() -> None:
    class Doubtful(World):
        """The first look at the frozen tree shows something else."""

        looks = 0

        async def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
            found = await super().states(pids)
            if set(self.scores.values()) == {FROZEN_OOM_SCORE}:
                self.looks += 1
                if self.looks == 1:
                    found[MAIN] = DriverState.FAILED
            return found

    world = Doubtful()
    mover = Mover(world, world, SystemClock(), 1.0)  # type: ignore[arg-type]
    report = await mover.run(TREE, Move.FREEZE)
    assert report.outcome is Outcome.ROLLED_BACK
    assert world.scores == OWN_SCORES
    assert not report.oom_scores


async def test_a_process_that_took_vram_before_the_stop_is_checkpointed_too() -> None:
    world = World()
    world.states_of[CHILD] = DriverState.NONE
    signal_to = world.signal

    async def signal(members: Sequence[Member], signal: int) -> None:
        if world.states_of[CHILD] is DriverState.NONE:
            world.states_of[CHILD] = DriverState.RUNNING  # at the last moment
        await signal_to(members, signal)

    world.signal = signal  # type: ignore[method-assign]
    mover = Mover(world, world, SystemClock(), 1.0)  # type: ignore[arg-type]
    report = await mover.run(TREE, Move.FREEZE)
    assert report.outcome is Outcome.DONE, report.error
    assert set(world.states_of.values()) == {DriverState.CHECKPOINTED}
    assert all(world.stopped.values())


class NoDisk:
    """A machine without a disk tier."""

    async def images(self) -> list[Image]:
        return []


async def recovered(world: World, state: ProcState) -> Process:
    """What a new daemon makes of the tree of ``world``, which its journal has in ``state``."""
    process = Process(
        tree_id="t",
        name="w",
        uid=0,
        user="root",
        gpus=("GPU-0",),
        started_unix_s=0.0,
        last_used_unix_s=0.0,
        state=state,
        main=TREE.main,
        vram={"GPU-0": 1},
    )
    mover = Mover(world, world, SystemClock(), 1.0)  # type: ignore[arg-type]
    disk = NoDisk()
    recovery = Recovery(world, world, SystemClock(), None, mover, disk)  # type: ignore[arg-type]
    (found,) = await recovery.recover(Remembered(processes={"t": process}))
    return found


async def test_an_active_process_that_its_owner_stopped_is_active_after_a_restart() -> None:
    world = World()
    world.stopped = {MAIN: True, CHILD: True}
    found = await recovered(world, ProcState.ACTIVE)
    assert (found.state, found.error) == (ProcState.ACTIVE, None)
    assert world.stopped == {MAIN: True, CHILD: True}


@pytest.mark.parametrize("was", [ProcState.FREEZING, ProcState.THAWING, ProcState.FAILED])
async def test_a_tree_that_was_stopped_half_way_is_continued_and_asked_again(
    was: ProcState,
) -> None:
    world = World()
    world.stopped = {MAIN: False, CHILD: True}
    world.states_of = {MAIN: DriverState.CHECKPOINTED, CHILD: DriverState.LOCKED}
    found = await recovered(world, was)
    assert found.state is ProcState.ACTIVE, found.error
    assert set(world.states_of.values()) == {DriverState.RUNNING}
    assert not any(world.stopped.values())
