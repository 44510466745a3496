"""Workloads that a private daemon manages, and what is really so about them: by /proc, the driver and their own words.

The daemon's word is compared with all three, so that a test cannot be content with a wrong ``status``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from daemons import PrivateDaemon, request, wait_until
from gpusched.mechanisms.sim.control import Word, Work
from gpusched.mechanisms.sim.layout import SimDirectory

READY_S = 30.0
_DIGEST = re.compile(r"(?:ready|tick (\d+)) digest=([0-9a-f]{16})")


def entries(daemon: PrivateDaemon) -> dict[str, dict[str, Any]]:
    """What ``status`` says of each process, by name."""
    listed = request(daemon.socket, "status")["result"]["processes"]
    return {entry["name"]: entry for entry in listed}


def done(daemon: PrivateDaemon, method: str, **params: Any) -> dict[str, Any]:
    """The result of a request that must succeed."""
    answer = request(daemon.socket, method, within_s=60.0, **params)
    assert answer["ok"], f"{method} {params}: {answer}"
    result: dict[str, Any] = answer["result"]
    return result


def refused(daemon: PrivateDaemon, code: str, method: str, **params: Any) -> dict[str, Any]:
    """The error of a request that must fail with ``code``."""
    answer = request(daemon.socket, method, within_s=60.0, **params)
    assert not answer["ok"], f"{method} {params}: {answer}"
    assert answer["code"] == code, answer
    return answer


class Workload:
    """``python -m gpusched.workload`` under ``name``; ``start`` runs it, the constructor takes over a running one."""

    def __init__(self, daemon: PrivateDaemon, name: str, pid: int, log: Path) -> None:
        self.daemon = daemon
        self.name = name
        self.pid = pid
        self.log = log
        wait_until(lambda: self._digests(), within_s=READY_S, what=f"{name} is ready")
        self.digest = self._digests()[0][1]

    @classmethod
    def start(
        cls, daemon: PrivateDaemon, name: str, vram: str = "24M", gpu: int = 0, seed: int = 1
    ) -> Workload:
        return cls(daemon, name, run(daemon, name, vram, gpu, seed), daemon.log_dir / f"{name}.log")

    def _digests(self) -> list[tuple[int, str]]:
        text = self.log.read_text() if self.log.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [(int(tick or 0), digest) for tick, digest in _DIGEST.findall(whole)]

    @property
    def entry(self) -> dict[str, Any]:
        return entries(self.daemon)[self.name]

    @property
    def is_stopped(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def driver(self) -> tuple[Word, Work, tuple[int, ...]]:
        """The state word, the work under way, and where the VRAM lies now, from the driver's own record."""
        record = SimDirectory(self.daemon.sim_dir).record(self.pid)
        assert record is not None, f"{self.name} has no driver state"
        where = tuple(sorted({record.gpu_map[each.gpu] for each in record.allocations}))
        return record.word, record.work, where

    def require(self, state: str, gpu: int | None = None, context_mb: int = 0) -> None:
        """The daemon says ``state`` (``gpu``, and what a context has kept), and the driver and the kernel the same."""
        entry = self.entry
        assert entry["state"] == state, entry
        assert entry["op"] is None, entry
        assert entry["pid"] == self.pid
        word, work, where = self.driver()
        off = Word.PARKED if context_mb else Word.CHECKPOINTED
        wanted = Word.RUNNING if state == "active" else off
        assert entry["context_mb"] == context_mb, entry
        assert (word, work) == (wanted, Work.NONE), (
            f"{self.name} is {state}, the driver says {word!r}"
        )
        assert self.is_stopped == (state == "frozen")
        if (
            state == "active"
        ):  # what is frozen is on none; where it comes back to shows when it does
            assert (entry["gpu"],) == where, "the daemon and the driver name different GPUs"
        assert gpu is None or entry["gpu"] == gpu

    def require_contents(self) -> None:
        """It works on, and every digest that it ever printed is the same."""
        count = len(self._digests())
        wait_until(
            lambda: len(self._digests()) > count, within_s=10.0, what=f"{self.name} ticks on"
        )
        self.require_log()

    def require_log(self) -> None:
        """The log is whole: each tick once, in order, every digest the same."""
        digests = self._digests()
        assert [tick for tick, _ in digests] == list(range(len(digests)))
        assert {digest for _, digest in digests} == {self.digest}
        assert "corrupt" not in self.log.read_text()


def run(daemon: PrivateDaemon, name: str, vram: str = "24M", gpu: int = 0, seed: int = 1) -> int:
    """Starts a workload; does not wait until it is ready. Returns its pid."""
    command = [sys.executable, "-m", "gpusched.workload", "--vram", vram, "--seed", str(seed)]
    pid: int = done(daemon, "run", name=name, cmd=command, gpu=gpu)["pid"]
    return pid
