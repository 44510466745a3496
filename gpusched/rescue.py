"""Thawing a process without any daemon: for the day when the daemon, or its state, is gone.

Continues, restores and unlocks a whole tree through a driver helper of its own. Needs root, or to be the owner as far
as the driver permits that. A daemon that manages the process learns of it at its next look.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any, Final

from gpusched import config, errors
from gpusched.domain.moves import Move, Outcome
from gpusched.engine.model import Tree
from gpusched.engine.moves import Mover
from gpusched.mechanisms import proc
from gpusched.mechanisms.clock import SystemClock
from gpusched.mechanisms.cuda import pool_home
from gpusched.mechanisms.driver_client import DriverClient
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.ports import OFF_GPU, DriverState, Member
from gpusched.units import GIB, KIB, format_size

#: A CUDA process's own host memory beside its saved VRAM; what exceeds it must be saved VRAM.
OWN_RSS_BYTES: Final = 4 * GIB
LOCK_TIMEOUT_S: Final = 10.0


def rescue(pid: int) -> dict[str, Any]:
    """Thaws ``pid`` and its descendants. Blocks for as long as the driver takes.

    Returns ``{"pid", "processes": [{"pid", "before", "after"}], "message"}``. Raises GpuschedError; the process is
    then as it was, or further on the way to running, never further from it.
    """
    return asyncio.run(_rescue(pid))


async def _rescue(pid: int) -> dict[str, Any]:
    options = _options(pid)
    with tempfile.TemporaryDirectory(prefix="gpusched-rescue-") as scratch:
        async with asyncio.TaskGroup() as tasks:
            driver = DriverClient(options, tasks)
            try:
                return await _thaw(driver, TreeKeeper(Path(scratch)), pid)
            except errors.GpuschedError as error:
                failure = error
            finally:
                driver.close()
        raise failure


async def _thaw(driver: DriverClient, trees: TreeKeeper, pid: int) -> dict[str, Any]:
    main = await trees.identify(pid)
    tree = Tree(tree_id=f"rescue-{pid}", main=main, vram={}, oom_scores={})
    mover = Mover(driver, trees, SystemClock(), LOCK_TIMEOUT_S)
    members, before = await mover.settle(tree)
    _require_own(members)
    await _require_room(driver, before)
    report = await mover.run(tree, Move.THAW)
    _, after = await mover.settle(tree)
    trees.close()
    if report.outcome is not Outcome.DONE:
        raise errors.ProcessLost(
            f"pid {pid} could not be brought back: {report.error} {report.note}".rstrip()
            + ". It still holds its memory; free VRAM or fix the cause and try again",
            {"before": before, "after": after},
        )
    listed = [
        {"pid": m.pid, "before": before.get(m.pid, "none"), "after": after.get(m.pid, "none")}
        for m in members
    ]
    frozen = sum(s in (*OFF_GPU, DriverState.LOCKED) for s in before.values())
    stopped = sum(m.stopped for m in members)
    return {
        "pid": pid,
        "processes": listed,
        "message": f"pid {pid} runs: {frozen} CUDA process(es) brought back, {stopped} continued",
    }


def _options(pid: int) -> list[str]:
    """The backend that the process lives on: simulated where its environment says so."""
    try:
        with Path(f"/proc/{pid}/environ").open("rb") as file:
            # A process may make it as long as it likes.
            environment = file.read(proc.MAX_ENVIRON_BYTES).split(b"\0")
    except FileNotFoundError:
        raise errors.NotFound(f"no process with pid {pid}") from None
    except PermissionError:
        raise errors.PermissionDenied(
            f"pid {pid} belongs to somebody else; try again with sudo"
        ) from None
    for entry in environment:
        name, _, value = entry.partition(b"=")
        if name == b"GPUSCHED_SIM_DIR":
            directory = os.fsdecode(value)
            _require_trusted(Path(directory))
            # 0: whatever the directory was made with
            return ["--backend", "sim", "--sim-dir", directory, "--sim-gpus", "0"]
    found = pool_home.in_use(config.load(None, {}).state_dir)
    where = ["--pool-dir", str(found), "--pool-of-another"] if found is not None else []
    return ["--backend", "cuda", "--allow-old-driver", *where]


def _require_trusted(directory: Path) -> None:
    """Raises PermissionDenied unless a daemon of ours made ``directory``.

    The name comes from the target's environment. Whoever owns what it names, or may rename something on the way
    there, could have the simulated driver remove and write files with our rights.
    """
    pattern = re.compile(rf"/dev/shm/gpusched-sim-{os.geteuid()}-[0-9a-f]{{8}}")  # noqa: S108 - compared
    try:
        found = directory.lstat()
    except OSError as error:
        raise errors.NotFound(f"no simulated GPUs at {directory}: {error.strerror}") from None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_ours or not pattern.fullmatch(str(directory)):
        raise errors.PermissionDenied(
            f"the process names simulated GPUs at {directory}, which no daemon of uid {os.geteuid()} made; "
            "try again as the user whose daemon it was"
        )


def _require_own(members: list[Member]) -> None:
    strangers = [m for m in members if os.geteuid() not in (0, m.ruid)]
    if strangers:
        raise errors.PermissionDenied(
            f"pid {strangers[0].pid} belongs to uid {strangers[0].ruid}; try again with sudo"
        )


async def _require_room(driver: DriverClient, states: dict[int, DriverState]) -> None:
    """Refuses what cannot fit: a restore that runs out of VRAM loses the process on some drivers."""
    saved = sum(
        max(0, _rss_bytes(pid) - OWN_RSS_BYTES) for pid, state in states.items() if state in OFF_GPU
    )
    free = sum(gpu.free_bytes for gpu in (await driver.usage()).gpus.values())
    if saved > free:
        raise errors.InsufficientGpuMemory(
            f"the saved VRAM is at least {format_size(saved)}, and the GPUs have {format_size(free)} free; "
            "make room first",
            {"need_bytes": saved, "free_bytes": free},
        )


def _rss_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KIB
    return 0
