"""The directory of one launched tree: what is in it and how it is read.

Covers: the files below, each written whole or not at all. Does not cover: starting (``launching.py``) and finding
processes (``trees.py``).

    launch.json      what was to be started, and its control group; written by the daemon before anything else
    alive.lock       locked for as long as the supervisor lives; holds the supervisor's identity
    started.json     the identity of the main process; there before the command runs its first instruction
    exit.json        how the main process ended: {"code": N} or {"signal": N}, and when
    supervisor.log   what the supervisor had to complain about; normally empty

An adopted tree has launch.json and started.json, both from the daemon, and nobody to write the rest.

Only the daemon's user can enter the directory: launch.json holds an environment, and so perhaps secrets. All of it
speaks of one boot of the host; after a power failure a torn or missing record means what is true anyway: not running.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpusched.ports import ExitStatus, Identity, Launch


@dataclass(frozen=True, slots=True)
class TreeFiles:
    """Reads never raise: what is missing or torn is None."""

    path: Path

    # -- written by the daemon --------------------------------------------------------------------

    def create(self) -> int:
        """Makes the directory and returns alive.lock, open and locked. Raises OSError (FileExistsError)."""
        self.path.mkdir(mode=0o700)
        fd = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    def discard_stale(self) -> None:
        """Removes what an earlier life of the tree left, if nobody lives there any more. Never raises."""
        if self.path.exists() and not self.is_supervised():
            shutil.rmtree(self.path, ignore_errors=True)

    def write_launch(self, launch: Launch, group: Path | None) -> None:
        """Raises OSError when the disk is full."""
        group_name = str(group) if group else None
        self._write("launch.json", {"launch": asdict(launch), "cgroup": group_name})

    def write_adopted(self, launch: Launch, main: Identity) -> None:
        """Makes the directory of a tree that somebody else started. Raises OSError."""
        self.path.mkdir(mode=0o700)
        self.write_launch(launch, None)
        self._write("started.json", asdict(main))

    def _write(self, name: str, record: dict[str, Any]) -> None:
        part = self.path / f"{name}.part"
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            json.dump(
                record, file
            )  # ASCII: keeps the odd bytes of an environment (surrogates) as they are
            file.flush()
            os.fsync(fd)
        part.rename(self.path / name)
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    # -- read by the daemon -----------------------------------------------------------------------

    def launch(self) -> Launch | None:
        try:
            record = dict(self._json("launch.json")["launch"])
            for name in ("argv", "groups"):
                record[name] = tuple(record[name])
            return Launch(**record)
        except (KeyError, TypeError):
            return None

    def group(self) -> Path | None:
        """The control group of the tree."""
        group = self._json("launch.json").get("cgroup")
        return Path(group) if group else None

    def main(self) -> Identity | None:
        """The main process; None when the command never came to run."""
        return self._identity("started.json")

    def supervisor(self) -> Identity | None:
        return self._identity("alive.lock")

    def exit_status(self) -> ExitStatus | None:
        record = self._json("exit.json")
        if "code" in record or "signal" in record:
            return ExitStatus(code=record.get("code"), signal=record.get("signal"))
        return None

    def is_supervised(self) -> bool:
        """Whether the supervisor lives, or the daemon is just starting it."""
        try:
            fd = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def is_starting(self) -> bool:
        # In this order: the record may appear, and the supervisor end, between two looks.
        return self.is_supervised() and self.main() is None

    def complaint(self) -> str:
        """The last line that a supervisor wrote before it gave up."""
        try:
            lines = (self.path / "supervisor.log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    @property
    def _lock(self) -> Path:
        return self.path / "alive.lock"

    def _identity(self, name: str) -> Identity | None:
        record = self._json(name)
        try:
            return Identity(**record)
        except TypeError:
            return None

    def _json(self, name: str) -> dict[str, Any]:
        """Empty when there is no such file, or it is torn."""
        try:
            record = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}
