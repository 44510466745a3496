"""The simulated driver: ``ports.DriverApi`` on files. Locks, moves the bytes for real, keeps to the capacity.

The last copy of anything is dropped only after the next is complete and the state word says so; a driver killed at
any instant loses nothing. What it leaves half done is void: the word alone is the truth, and the next driver of that
directory tidies up. See ``layout.py`` for the files, ``script.py`` for failures on order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from gpusched import errors
from gpusched.mechanisms.sim import moving
from gpusched.mechanisms.sim.control import (
    CONTEXT_BYTES,
    MAX_GPUS,
    Record,
    Word,
    Work,
    bytes_by_gpu,
    flocked,
    is_alive,
    parse_key,
    read_stat,
)
from gpusched.mechanisms.sim.layout import FRESH, SimDirectory
from gpusched.mechanisms.sim.script import Script, When
from gpusched.mechanisms.sim.target import Target, os_errors
from gpusched.ports import Description, DriverState, Gpu, GpuMemory, Obstacle, Usage
from gpusched.units import format_size

#: How long a call waits for another driver's call on the same process: one that was killed takes a moment to go.
_BUSY_WAIT_S: Final = 2.0
_TIDY_WAIT_S: Final = 0.2

_STATES: Final = {
    Word.RUNNING: DriverState.RUNNING,
    Word.LOCKED: DriverState.LOCKED,
    Word.CHECKPOINTED: DriverState.CHECKPOINTED,
    Word.PARKED: DriverState.PARKED,
    Word.FAILED: DriverState.FAILED,
}


class SimDriver:
    """Drives the processes that use one directory of simulated GPUs."""

    def __init__(self, directory: Path) -> None:
        """Opens an existing directory and tidies up after dead drivers and processes. Raises OSError without one."""
        self._sim = SimDirectory(directory)
        self._script = Script(directory)
        own = read_stat(os.getpid())
        self._worker = (os.getpid(), own.start_ticks if own else 0)
        self._collect()
        for record in self._sim.records():
            self._tidy(record)

    @classmethod
    def create(cls, directory: Path, gpus: int, vram_bytes: int) -> SimDriver:
        """Makes (or finds again) ``gpus`` simulated GPUs of ``vram_bytes`` each. UUIDs stay those of the directory.

        Raises InvalidRequest when live processes use it with other figures, PermissionDenied when it is another user's.
        """
        if not 1 <= gpus <= MAX_GPUS or vram_bytes <= 0:
            raise errors.InvalidRequest(
                f"{gpus} simulated GPUs of {vram_bytes} bytes: not possible"
            )
        _create_directory(directory)
        wanted = [_gpu(directory, index, vram_bytes) for index in range(gpus)]
        described = directory / "gpus.json"
        if described.exists():
            present = SimDirectory(directory)
            used = sum(1 for _ in present.records()) if list(present.gpus) != wanted else 0
            if used:
                raise errors.InvalidRequest(
                    f"{used} live processes use the simulated GPUs at {directory} "
                    f"({len(present.gpus)} of {format_size(present.gpus[0].total_bytes)}): "
                    "keep to those figures, end the processes, or take another directory"
                )
        fresh = directory / "gpus.json.new"
        fresh.write_text(json.dumps({"gpus": [asdict(gpu) for gpu in wanted]}))
        fresh.chmod(0o644)
        fresh.replace(described)
        return cls(directory)

    # -- questions --------------------------------------------------------------------------------

    def describe(self) -> Description:
        self._scripted("describe", None, "before")
        return Description(
            backend="sim",
            simulated=True,
            driver_version="simulated",
            gpus=self._sim.gpus,
            can_migrate=True,
            context_bytes=CONTEXT_BYTES,
        )

    def usage(self) -> Usage:
        """Bytes that processes hold, of PARKED ones what stands for a context. Removes files of dead ones."""
        self._scripted("usage", None, "before")
        with os_errors("usage", None):
            self._collect()
            with self._sim.capacity():
                shares = self._sim.shares()
        free = self._sim.free_bytes(shares)
        gpus = self._sim.gpus
        return Usage(
            gpus={
                gpu.uuid: GpuMemory(
                    total_bytes=gpu.total_bytes,
                    used_bytes=gpu.total_bytes - free[gpu.index],
                    free_bytes=free[gpu.index],
                )
                for gpu in gpus
            },
            processes={
                pid: {gpus[index].uuid: size for index, size in share.items()}
                for pid, share in shares.items()
            },
        )

    def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        found = {}
        for pid in pids:
            rules = self._script.due("states", pid, "before")
            self._script.act(rules, "states", pid)
            found[pid] = self._state(pid)
            for rule in rules:
                found[pid] = found[pid] if rule.state is None else DriverState(rule.state)
        return found

    def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        """Those that the script says; simulated memory has none of its own."""
        found = []
        for pid in pids:
            rules = self._script.due("obstacles", pid, "before")
            self._script.act(rules, "obstacles", pid)
            found += [each for rule in rules if (each := rule.to_obstacle(pid)) is not None]
        return found

    # -- calls ------------------------------------------------------------------------------------

    def lock(self, pid: int, timeout_s: float) -> None:
        with self._target("lock", pid, Word.RUNNING) as target:
            self._scripted("lock", target, "before")
            target.control.set_word(Word.LOCKED)
            try:
                with flocked(target.gate_fd, timeout_s):
                    pass
            except TimeoutError as error:
                target.control.set_word(Word.RUNNING)
                raise errors.LockTimeout(
                    f"pid {pid} did not come to rest within {timeout_s:g} s (simulated): a call of it goes on",
                    {"call": "lock", "result": "NOT_READY", "pid": pid},
                ) from error
            self._scripted("lock", target, "after")

    def absorb(self, pid: int) -> None:
        """What is saved lies beside the simulated GPU, and travels with the tree's own directory."""
        if self._state(pid) is DriverState.PARKED:
            raise errors.DriverError(
                f"pid {pid} has its context on the simulated GPU still: checkpoint it first",
                {"pid": pid},
            )

    def unlock(self, pid: int) -> None:
        with self._target("unlock", pid, Word.LOCKED) as target:
            self._scripted("unlock", target, "before")
            moving.drop_saved(target.saved_fd)
            target.control.set_word(Word.RUNNING)
            self._scripted("unlock", target, "after")

    def checkpoint(self, pid: int, *, keep_context: bool = False) -> None:
        with self._target("checkpoint", pid, Word.LOCKED, Word.PARKED) as target:
            target.require_scheduled()
            if target.record().word is Word.PARKED:
                self._deepen(target, keep_context=keep_context)
                return
            with target.at_rest(), target.working(Work.CHECKPOINTING, self._worker):
                allocations = target.record().allocations
                self._scripted("checkpoint", target, "before")
                try:
                    moving.save(target.dir_fd, target.saved_fd, allocations)
                    self._scripted("checkpoint", target, "middle")
                    target.require_alive()
                except BaseException:
                    moving.drop_saved(target.saved_fd)
                    raise
                target.control.set_word(Word.PARKED if keep_context else Word.CHECKPOINTED)
                moving.empty(target.dir_fd, allocations)
            self._scripted("checkpoint", target, "after")

    def _deepen(self, target: Target, *, keep_context: bool) -> None:
        """Its contents are saved; what stands for its context goes too, unless that may stay."""
        self._scripted("checkpoint", target, "before")
        if not keep_context:
            target.control.set_word(Word.CHECKPOINTED)
        self._scripted("checkpoint", target, "after")

    def restore(self, pid: int, gpu_map: Mapping[str, str] | None) -> None:
        with self._target("restore", pid, Word.CHECKPOINTED, Word.PARKED) as target:
            target.require_scheduled()
            pending = self._map(target, gpu_map)
            with target.working(Work.NONE, self._worker):
                self._reserve(target, pending)
                allocations = target.record().allocations
                self._scripted("restore", target, "before")
                try:
                    moving.bring_back(target.dir_fd, target.saved_fd, allocations)
                    self._scripted("restore", target, "middle")
                    target.require_alive()
                except BaseException:
                    moving.empty(target.dir_fd, allocations)
                    raise
                target.control.set_word(Word.LOCKED, switch_map=True)
            moving.drop_saved(target.saved_fd)
            self._scripted("restore", target, "after")

    # -- inside -----------------------------------------------------------------------------------

    def _map(self, target: Target, gpu_map: Mapping[str, str] | None) -> tuple[int, ...]:
        """The map that holds after a restore. As in CUDA, one that is no full permutation is an invalid value."""
        now = target.record().gpu_map
        if gpu_map is None:
            return now
        index = {gpu.uuid: gpu.index for gpu in self._sim.gpus}
        if set(gpu_map) != set(index) or set(gpu_map.values()) != set(index):
            raise target.error(
                "INVALID_VALUE", "the GPU map is not a full permutation of all simulated GPUs"
            )
        uuids = [gpu.uuid for gpu in self._sim.gpus]
        return tuple(index[gpu_map[uuids[gpu]]] for gpu in now)

    def _reserve(self, target: Target, pending: tuple[int, ...]) -> None:
        """Promises the VRAM of a restore: from here on it counts, for as long as this driver lives and works on it."""
        with self._sim.capacity():
            needs = bytes_by_gpu(target.record().allocations, pending)
            others = self._sim.shares()
            others.pop(target.pid, None)  # its context is a part of what it needs
            free = self._sim.free_bytes(others)
            for gpu, need in needs.items():
                if need > free[gpu]:
                    raise target.error(
                        "OUT_OF_MEMORY",
                        f"{format_size(need)} needed on simulated GPU {gpu}, {format_size(free[gpu])} free",
                        gpu=self._sim.gpus[gpu].uuid,
                        need_bytes=need,
                        free_bytes=free[gpu],
                    )
            target.control.set_pending_map(pending)
            target.control.begin_work(Work.RESTORING, self._worker)

    def _state(self, pid: int) -> DriverState:
        record = self._sim.record(pid)
        if record is None:
            return DriverState.NONE
        return _STATES[record.word] if record.work is Work.NONE else DriverState.CHANGING

    def _scripted(self, call: str, target: Target | None, when: When) -> None:
        pid = target.pid if target else None
        rules = self._script.due(call, pid, when)
        if target is not None and any(rule.state is not None for rule in rules):
            target.control.set_word(Word.FAILED)
        self._script.act(rules, call, pid)

    @contextmanager
    def _target(self, call: str, pid: int, *wanted: Word) -> Iterator[Target]:
        """Opens ``pid`` for one call and keeps every other call off it. Foreign errors become DriverError here."""
        with os_errors(call, pid), ExitStack() as stack:
            target = Target(self._sim, call, pid, stack)
            try:
                stack.enter_context(flocked(target.saved_fd, _BUSY_WAIT_S))
            except TimeoutError as error:
                raise target.error("NOT_READY", "another driver call on it is under way") from error
            word = target.record().word
            if word not in wanted:
                raise target.error("ILLEGAL_STATE", f"it is {word.name}, not {wanted[0].name}")
            yield target

    def _tidy(self, record: Record) -> None:
        """Drops what a dead driver left of one process: copies that the state word does not count on."""
        try:
            with ExitStack() as stack:
                target = Target(self._sim, "tidy", record.pid, stack)
                stack.enter_context(flocked(target.saved_fd, _TIDY_WAIT_S))
                record = target.record()
                target.control.end_work()
                if record.word in (Word.CHECKPOINTED, Word.PARKED):
                    moving.empty(target.dir_fd, record.allocations)
                elif record.word is not Word.FAILED:
                    moving.drop_saved(target.saved_fd)
        except (OSError, TimeoutError, errors.DriverError):
            pass  # gone meanwhile, or another driver is at work: then the rest is that one's to drop

    def _collect(self) -> None:
        """Removes the files of dead processes; truncated first, since a forked child may still have them mapped.

        A process that is being brought back from disk comes after its files: its tree is left alone until then.
        """
        self._collect_in(self._sim.path)
        for tree in self._sim.trees():
            with contextlib.suppress(OSError):
                fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._collect_in(tree)
                finally:
                    os.close(fd)

    def _collect_in(self, directory: Path) -> None:
        for folder in (directory / "procs", directory / "saved"):
            for name in os.listdir(folder) if folder.exists() else ():  # noqa: PTH208
                if not self._is_used(directory, name):
                    if folder.name == "procs":
                        moving.truncate_all(folder / name)
                    shutil.rmtree(folder / name, ignore_errors=True)

    def _is_used(self, directory: Path, name: str) -> bool:
        """Whether the process of that name is there. One that is being set up in a tree of its own counts: the tree's
        end takes what is left of it.
        """
        key = parse_key(name.removeprefix(FRESH))
        if key is None or self._sim.is_alive(directory / "procs" / name):
            return True
        if name.startswith(FRESH):
            return directory != self._sim.path or is_alive(*key)
        return False


def _gpu(directory: Path, index: int, vram_bytes: int) -> Gpu:
    digest = hashlib.sha256(f"{directory.resolve()} {index}".encode()).hexdigest()
    return Gpu(
        index=index,
        uuid=f"GPU-sim{index:05d}-{digest[:4]}-{digest[4:8]}-{digest[8:12]}-{digest[12:24]}",
        name="Simulated GPU",
        total_bytes=vram_bytes,
    )


def _create_directory(directory: Path) -> None:
    """Makes the directory and what lies in it. The driver's user owns it; targets may only add to procs/."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise errors.PermissionDenied(f"{directory} is not a directory of this user's")
    directory.chmod(0o755)
    for name, mode in (("procs", 0o1777), ("saved", 0o700), ("trees", 0o755), ("host", 0o755)):
        (directory / name).mkdir(exist_ok=True)
        (directory / name).chmod(mode)
    lock = directory / "capacity.lock"
    lock.touch()
    lock.chmod(0o666)
