"""Real trees for tests: launched with short notation, and ended for certain.

Covers: a TreeKeeper in a directory of its own, and ending everything that it started. Every process carries a mark in
its environment, so that a test can find all of them without the code under test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from daemons import wait_until
from gpusched.mechanisms import cgroups, proc
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.ports import Identity, Launch

IS_ROOT = os.geteuid() == 0
#: Whom the commands run as: somebody who may do nothing, where the tests are root.
UID = 65534 if IS_ROOT else os.geteuid()
GID = 65534 if IS_ROOT else os.getegid()
PATH = "/usr/local/bin:/usr/bin:/bin"


class LiveTrees:
    """A state directory, a log directory and one keeper after another over them."""

    def __init__(self, *, with_groups: bool = True, isolated: bool = False) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="gs-trees-"))
        self.directory.chmod(0o755)  # the commands' user may pass
        self.logs = self.directory / "logs"
        self.logs.mkdir()
        self.mark = f"GPUSCHED_TEST={uuid.uuid4().hex}"
        self._with_groups = with_groups
        self.isolated = isolated
        self._tree_ids: list[str] = []
        self.keeper = self.new_keeper()

    def new_keeper(self) -> TreeKeeper:
        """What a restarted daemon has: it knows nothing but the files."""
        self.keeper = TreeKeeper(self.directory / "state", with_groups=self._with_groups)
        return self.keeper

    def order(
        self,
        *argv: str,
        name: str = "job",
        env: dict[str, str] | None = None,
        cwd: str = "/",
        uid: int = UID,
        gid: int = GID,
        groups: tuple[int, ...] = (),
        log_path: str | None = None,
    ) -> Launch:
        key, _, value = self.mark.partition("=")
        self._tree_ids.append(f"t{uuid.uuid4().hex}")
        return Launch(
            tree_id=self._tree_ids[-1],
            name=name,
            argv=argv,
            env={"PATH": PATH, key: value} if env is None else env,
            cwd=cwd,
            uid=uid,
            gid=gid,
            groups=groups,
            log_path=log_path or str(self.logs / f"{name}.log"),
            isolated=self.isolated,
        )

    async def shell(self, script: str, name: str = "job") -> tuple[str, Identity]:
        """Starts ``sh -c script``; (tree id, main process)."""
        order = self.order("sh", "-c", script, name=name)
        return order.tree_id, await self.keeper.launch(order)

    def tree(self, tree_id: str) -> Path:
        return self.directory / "state" / "trees" / tree_id

    def log(self, name: str = "job") -> str:
        return (self.logs / f"{name}.log").read_text()

    def marked(self) -> set[int]:
        """The live processes with our mark, found without the code under test. Zombies have no environment."""
        return {pid for pid in all_pids() if self.mark in environment_of(pid)}

    def sleepers(self) -> set[int]:
        """Those of them that are sleep(1) already: a shell that has yet to become one comes and goes."""
        return {pid for pid in self.marked() if command_line(pid).startswith("sleep ")}

    def supervisors(self) -> set[int]:
        """Processes that name our directory and are supervisors."""
        return {
            pid
            for pid in all_pids()
            if "supervisor.py" in (line := command_line(pid)) and str(self.directory) in line
        }

    def _remove_groups(self) -> bool:
        paths = [path for i in self._tree_ids if (path := cgroups.TreeGroups().path_for(i))]
        for path in paths:
            cgroups.remove(path)
        return not any(path.exists() for path in paths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        def is_gone() -> bool:
            # Commands first: their supervisors record the end, and remove the control groups.
            left = self.marked()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left and not self.supervisors()

        wait_until(is_gone, within_s=10.0, what="all trees have ended")
        # Supervisors remove the groups; not those that a test has killed.
        wait_until(self._remove_groups, within_s=10.0, what="all control groups are removed")
        self.keeper.close()
        shutil.rmtree(self.directory)


def all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def environment_of(pid: int) -> set[str]:
    try:
        return {f"{key}={value}" for key, value in proc.environ(pid).items()}
    except OSError:
        return set()


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """The letter of ps; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def interpreter_for_others() -> str:
    """One that any user may run (ours may lie below /root) and that is new enough."""
    for program in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            ended = subprocess.run(
                [program, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                user=UID if IS_ROOT else None,
                group=GID if IS_ROOT else None,
                extra_groups=[] if IS_ROOT else None,
                check=False,
            )
            if ended.returncode == 0:
                return program
    pytest.skip("other users may run no Python 3.11 here")
