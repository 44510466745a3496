"""What tests of the disk tier share: a program with everything that is hard to save, images, and CRIU at work.

Everything here is real: CRIU dumps and restores, in namespaces of each tree's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daemons import PrivateDaemon, request, wait_until
from workloads import Workload, done, entries

#: Holds what CRIU has to bring back: threads, a child with a pipe, a semaphore, a listener, a file without a name,
#: an open file in its own directory, and a clock that it never sees going backwards.
RICH = """
import multiprocessing, os, socket, sys, tempfile, threading, time
port_file, data_file = sys.argv[1:3]
semaphore = multiprocessing.get_context("fork").Semaphore(3)
gone = tempfile.TemporaryFile(); gone.write(b"nameless" * 1000); gone.flush()
data = open(data_file, "a+") if data_file else None
read_end, write_end = os.pipe()
if os.fork() == 0:
    while True:
        semaphore.acquire(); os.write(write_end, b"."); semaphore.release(); time.sleep(0.02)
listener = socket.create_server(("127.0.0.1", 0))
def serve():
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"%d" % os.getpid()); connection.close()
threads = [threading.Thread(target=time.sleep, args=(1e6,), daemon=True) for _ in range(8)]
threads.append(threading.Thread(target=serve, daemon=True))
for thread in threads:
    thread.start()
with open(port_file + ".part", "w") as file:
    file.write(str(listener.getsockname()[1]))
os.rename(port_file + ".part", port_file)
last, count = time.monotonic(), 0
while True:
    os.read(read_end, 1)
    now = time.monotonic()
    assert now >= last, "time went backwards"
    assert os.pread(gone.fileno(), 8, 0) == b"nameless"
    last, count = now, count + 1
    if data:
        data.write("."); data.flush()
    if count % 5 == 0:
        print("beat", count // 5, flush=True)
"""


def images(daemon: PrivateDaemon) -> list[str]:
    """Names of the complete images, and of what is left of others."""
    folder = daemon.state_dir / "images"
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.exists() else []


def wait_no_image(daemon: PrivateDaemon) -> None:
    wait_until(lambda: not images(daemon), within_s=10, what=f"no image is left: {images(daemon)}")


def again(workload: Workload) -> Workload:
    """The same workload with the pid that it has now."""
    workload.pid = int(entries(workload.daemon)[workload.name]["pid"])
    return workload


def start_rich(daemon: PrivateDaemon, name: str, data_file: str = "") -> int:
    """Runs ``RICH``; its port, once it listens."""
    port_file = daemon.directory / f"{name}.port"
    cmd = [sys.executable, "-c", RICH, str(port_file), data_file]
    done(daemon, "run", name=name, cmd=cmd, dir=str(daemon.directory))
    wait_until(port_file.exists, within_s=20, what=f"{name} listens")
    return int(port_file.read_text())


def beats(daemon: PrivateDaemon, name: str) -> list[int]:
    lines = (daemon.log_dir / f"{name}.log").read_text().splitlines()
    return [int(number) for number in re.findall(r"^beat (\d+)$", "\n".join(lines), re.M)]


def require_beating(daemon: PrivateDaemon, name: str, since: int = 1) -> None:
    """It goes on, and its log is whole: each beat once, in order, nothing else."""
    before = len(beats(daemon, name))
    wait_until(
        lambda: len(beats(daemon, name)) > before,
        within_s=15,
        what=f"{name} beats on: {log(daemon, name)}",
    )
    found = beats(daemon, name)
    assert found == list(range(since, since + len(found)))
    assert len(log(daemon, name).splitlines()) in (len(found), len(found) + 1)


def log(daemon: PrivateDaemon, name: str) -> str:
    return (daemon.log_dir / f"{name}.log").read_text()


def criu_at_work(daemon: PrivateDaemon) -> list[int]:
    """CRIU processes that work in a namespace of this daemon's trees, with what leads them in."""
    spaces = set()
    for tree in (daemon.state_dir / "trees").iterdir():
        with contextlib.suppress(OSError, ValueError):
            init = json.loads((tree / "alive.lock").read_text())["pid"]
            about = Path(f"/proc/{init}/ns/pid").stat()
            spaces.add(b"GPUSCHED_INSIDE=%d:%d" % (about.st_dev, about.st_ino))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                marks = (entry / "environ").read_bytes().split(b"\0")
                if b"--manage-cgroups=ignore" in words and spaces & set(marks):
                    found.append(int(entry.name))
    return found


class Killer(threading.Thread):
    """Kills CRIU as soon as one is at work, after ``delay_s``; ``hits`` says how many it got."""

    def __init__(self, target: PrivateDaemon, delay_s: float, *, within_s: float = 10.0) -> None:
        super().__init__(daemon=True)
        self._target = target
        self._delay_s = delay_s
        self._deadline = time.monotonic() + within_s
        self.hits = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set() and time.monotonic() < self._deadline:
            if criu_at_work(self._target):
                time.sleep(self._delay_s)
                for pid in criu_at_work(self._target):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        self.hits += 1
                if self.hits:
                    return
            time.sleep(0.001)


@contextlib.contextmanager
def killing_criu(daemon: PrivateDaemon, delay_s: float = 0.0) -> Iterator[Killer]:
    killer = Killer(daemon, delay_s)
    killer.start()
    try:
        yield killer
    finally:
        killer.stop.set()
        killer.join()


def ask_quietly(daemon: PrivateDaemon, method: str, **params: Any) -> dict[str, Any]:
    """A request whose daemon may die: the answer, or the error of the connection as one."""
    try:
        return request(daemon.socket, method, within_s=60, **params)
    except OSError as error:
        return {"ok": False, "code": "gone", "error": repr(error)}
