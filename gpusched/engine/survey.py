"""Looking at the world for a decision: VRAM, host RAM, the trees an operation is about. Changes nothing.

Covers: samples of VRAM (fresh for a decision, recent for ``status``) and the facts of an operation's trees.
Does not cover: deciding (``admission.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from gpusched import errors
from gpusched.engine.events import Surveyed, TreeFacts
from gpusched.engine.model import Process, to_record
from gpusched.ports import Clock, Disk, DiskFacts, Driver, Host, Identity, Trees, Usage

log = logging.getLogger(__name__)

#: How old a figure in ``status`` may be (a promise of the wire).
RECENT_S: Final = 0.25
#: How long ``status`` waits for a newer sample before it answers with the last one.
PATIENCE_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """VRAM at one instant; ``held[tree_id][uuid]`` in bytes, for each managed tree that holds any."""

    taken_s: float
    usage: Usage
    held: dict[str, dict[str, int]] = field(default_factory=dict)


async def take_sample(
    driver: Driver, trees: Trees, clock: Clock, mains: Mapping[str, Identity]
) -> Sample:
    """Asks the driver now. ``mains`` are the managed trees, to attribute pids to."""
    taken_s = clock.monotonic_s()
    usage = await driver.usage()
    owners = await trees.locate(list(usage.processes), mains)
    held: dict[str, dict[str, int]] = {}
    for pid, tree_id in owners.items():
        into = held.setdefault(tree_id, {})
        for uuid, size in usage.processes[pid].items():
            into[uuid] = into.get(uuid, 0) + size
    return Sample(taken_s=taken_s, usage=usage, held=held)


class Sampler:
    """The last sample, renewed when somebody asks and it is older than RECENT_S. One look at a time."""

    def __init__(
        self, driver: Driver, trees: Trees, clock: Clock, tasks: asyncio.TaskGroup
    ) -> None:
        self._driver = driver
        self._trees = trees
        self._clock = clock
        self._tasks = tasks
        self._looking: asyncio.Task[None] | None = None
        self._stale = False
        self.last = Sample(taken_s=float("-inf"), usage=Usage(gpus={}))

    def invalidate(self) -> None:
        """An operation has changed who holds what: the next reader gets a new sample."""
        self._stale = True

    async def recent(self, mains: Callable[[], Mapping[str, Identity]]) -> Sample:
        """A sample at most RECENT_S old; the last one when the driver takes longer than PATIENCE_S.

        It is renewed when it has half that age, so that somebody who asks often never waits.
        """
        age_s = self._clock.monotonic_s() - self.last.taken_s
        if self._stale or age_s > RECENT_S / 2:
            must_wait = self._stale or age_s > RECENT_S
            if self._looking is None or self._looking.done():
                self._looking = self._tasks.create_task(self._renew(mains), name="sample")
            if must_wait:
                await asyncio.wait([self._looking], timeout=PATIENCE_S)
        return self.last

    async def _renew(self, mains: Callable[[], Mapping[str, Identity]]) -> None:
        """Looks again where something changed in the middle: the first look may be from before."""
        self._stale = True
        try:
            while self._stale:
                self._stale = False
                self.last = await take_sample(self._driver, self._trees, self._clock, mains())
        except errors.GpuschedError as error:
            log.warning("no VRAM sample: %s", error)


class Surveyor:
    """Gathers what ``admission`` decides by."""

    def __init__(self, driver: Driver, trees: Trees, host: Host, clock: Clock, disk: Disk) -> None:
        self._driver = driver
        self._trees = trees
        self._host = host
        self._clock = clock
        self._disk = disk

    async def survey(
        self,
        op_id: str,
        off: Iterable[Process],
        on: Iterable[Process],
        to_disk: Iterable[Process],
        mains: Mapping[str, Identity],
    ) -> Surveyed:
        """Facts for freezing ``off``, saving ``to_disk`` and bringing ``on`` back. Never raises: see ``error``.

        Costs two or three driver calls, one look at /proc for each tree, the obstacle checks of each in ``off`` and
        ``to_disk``, and a comparison of each image with this machine.
        """
        on = list(on)
        try:
            sample, facts, disk, changes = await asyncio.gather(
                take_sample(self._driver, self._trees, self._clock, mains),
                asyncio.gather(
                    *(self._look(process, with_obstacles=True) for process in off),
                    *(self._look(p, with_obstacles=False) for p in on if p.main is not None),
                ),
                asyncio.gather(*(self._look_for_disk(process) for process in to_disk)),
                asyncio.gather(*(self._compare(p) for p in on if p.main is None)),
            )
        except errors.GpuschedError as error:
            return Surveyed(op_id=op_id, error=error)
        return Surveyed(
            disk=dict(disk),
            changes=dict(changes),
            op_id=op_id,
            taken_s=sample.taken_s,
            usage=sample.usage,
            held=sample.held,
            ram=self._host.ram(),
            trees=dict(facts),
        )

    async def _look_for_disk(self, process: Process) -> tuple[str, DiskFacts]:
        assert process.main is not None
        members = await self._trees.members(process.tree_id, process.main)
        facts = await self._disk.look(process.tree_id, process.main, members, to_record(process))
        return process.tree_id, facts

    async def _compare(self, process: Process) -> tuple[str, list[str]]:
        assert process.on_disk is not None
        return process.tree_id, await self._disk.changes(process.on_disk.image)

    async def _look(self, process: Process, *, with_obstacles: bool) -> tuple[str, TreeFacts]:
        assert process.main is not None
        members = await self._trees.members(process.tree_id, process.main)
        obstacles = (
            await self._driver.obstacles([m.pid for m in members])
            if with_obstacles and members
            else []
        )
        room = self._host.cgroup_room_bytes(process.main.pid) if with_obstacles else None
        return process.tree_id, TreeFacts(
            members=tuple(members), obstacles=tuple(obstacles), cgroup_room_bytes=room
        )
