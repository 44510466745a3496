"""Trees in namespaces of their own for tests of CRIU, with an init that does nothing else (``tiny_init.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemons import ROOT, wait_until
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import run
from gpusched.mechanisms.criu import tree as trees
from gpusched.mechanisms.criu.image import About
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside, open_log
from gpusched.mechanisms.criu.manifest import Manifest
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.criu.system import read_machine
from gpusched.ports import Identity

#: Holds that many MiB with known contents, and says every 5 ms how often it has looked and what it saw.
COUNTER = """
import sys, time, zlib, random
memory = random.Random(7).randbytes(1 << 20) * int(sys.argv[1])
count = 0
while True:
    count += 1
    print(count, zlib.crc32(memory) if count % 20 == 1 else "", flush=True)
    time.sleep(0.005)
"""
#: Saves as a daemon would, and is killed meanwhile.
SAVER = """
import os, sys
from pathlib import Path
from gpusched.mechanisms.criu import tree
from gpusched.mechanisms.criu import tree as trees
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside
from gpusched.mechanisms.criu.program import Program
from gpusched.ports import Identity
criu = Program(path=sys.argv[1], version=(), executable=sys.argv[2])
init = Identity(pid=int(sys.argv[3]), start_ticks=int(sys.argv[4]), boot_id="")
with Inside(init) as inside, ImageStore(Path(sys.argv[5])).begin("a") as draft:
    print("begin", flush=True)
    tree.save(criu, inside, draft, name="job", timeout_s=60)
    os.kill(os.getpid(), 9)
"""
PYTHON = [os.path.realpath(sys.executable), "-I", "-S"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolated:
    """The first process of the namespaces, and the log of the main one."""

    init: Identity
    log: Path

    def counts(self) -> list[int]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [int(line.split()[0]) for line in lines if line.strip()]

    def sums(self) -> set[str]:
        """The checksums of its memory that it has printed; one, unless it was damaged."""
        return {
            line.split()[1] for line in self.log.read_text().splitlines() if len(line.split()) > 1
        }

    def wait_for_more(self, more: int = 3) -> None:
        begun = len(self.counts())
        wait_until(lambda: len(self.counts()) >= begun + more, within_s=20, what="it counts on")


@contextmanager
def isolated(log: Path, argv: Sequence[str] = (), uid: int = 0) -> Iterator[Isolated]:
    """Namespaces with a command as pid 1000 in them, or empty ones to restore into. All of it ends with the block."""
    command = ["unshare", "--pid", "--mount", "--fork", "--kill-child", *PYTHON]
    command += [str(ROOT / "tests" / "tiny_init.py")]
    command += [str(log), str(uid), *argv] if argv else []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as unshare:
        try:
            assert unshare.stdout is not None
            assert unshare.stdout.read(5) == b"ready"
            children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text()
            yield Isolated(init=proc.identify(int(children)), log=log)
        finally:
            unshare.kill()


@contextmanager
def counting(log: Path, mib: int = 8) -> Iterator[Isolated]:
    with isolated(log, [*PYTHON, "-c", COUNTER, str(mib)]) as tree:
        wait_until(lambda: len(tree.counts()) > 2, within_s=20, what="it counts")
        yield tree


def about(program: Program, **more: Any) -> About:
    fields = {
        "name": "job",
        "uid": 0,
        "created_unix_s": time.time(),
        "machine": read_machine(program),
    }
    return About(**{**fields, **more})


def save(criu: Program, tree: Isolated, store: ImageStore, image_id: str = "a") -> Manifest:
    """The whole way of a hibernation but for the end of the original, which stays stopped."""
    with Inside(tree.init) as inside, store.begin(image_id) as draft:
        saved = trees.save(criu, inside, draft, name="job", timeout_s=60)
        return draft.commit(about(criu, used=saved.used, unnamed=saved.unnamed))


def bring_back(
    criu: Program, tree: Isolated, store: ImageStore, old_log: Path, image_id: str = "a"
) -> run.Restored:
    """Restores an image into a tree and lets it go on, its output in the tree's log."""
    with store.open(image_id) as image, Inside(tree.init) as inside:
        log = open_log(inside, str(tree.log), 0, 0)
        try:
            back = trees.bring_back(
                criu,
                inside,
                image,
                name="job",
                now=read_machine(criu),
                timeout_s=60,
                inherited={str(old_log): log},
            )
        finally:
            os.close(log)
    run.resume(back.tasks)
    return back
