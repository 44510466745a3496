"""Saving a process to disk and bringing it back, against the raw disk: what bounds it, and what each checksum costs.

    python benchmarks/criu_images.py [--gib 2,4] [--rounds 3] [--dir DIR] [--criu PATH] [--out DIR]

CPU only, as root, with CRIU. The process holds that much memory of which no two pages are the same; its contents are
verified by a digest after each restore. A save is the dump with everything up to the commit (checksums, fsync); a
restore begins with an empty page cache and has the verification in it. The raw disk is written and read in the same
rounds, with 8 MiB at a time past the page cache: by one thread (sequential), and by four.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import machine
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import program, run, tree
from gpusched.mechanisms.criu.image import About
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside, open_log
from gpusched.mechanisms.criu.program import Program
from gpusched.mechanisms.criu.system import read_machine
from gpusched.ports import Identity
from gpusched.units import GIB, MIB

INIT: Final = Path(__file__).resolve().parent.parent / "tests" / "tiny_init.py"
BLOCK: Final = 8 * MIB
#: Holds MiBs of its own, and says their digest at the start and after each SIGUSR1.
HOLDER: Final = """
import hashlib, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
memory = bytearray(int(sys.argv[1]) << 20)
for at in range(0, len(memory), 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(1 << 20)
while True:
    print(hashlib.sha256(memory).hexdigest(), flush=True)
    signal.sigwait([signal.SIGUSR1])
"""
PYTHON: Final = [os.path.realpath(sys.executable), "-I", "-S"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", default="2,4", help="sizes of the process (default: 2,4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, help="where the images are to be (default: a temporary directory)"
    )
    parser.add_argument("--criu", default=str(INIT.parent.parent / ".criu/bin/criu"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = program.find(args.criu)
    if found.program is None:
        print(found.why_not, file=sys.stderr)
        return 1
    directory = Path(tempfile.mkdtemp(prefix="criu-images-", dir=args.dir))
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "criu": ".".join(map(str, found.program.version)),
        "touch_s": machine.touch_ram(int(max(map(float, args.gib.split(","))) * 2 * GIB)),
        "checksums_gb_s": checksums(),
        "sizes": [],
    }
    try:
        for gib in map(float, args.gib.split(",")):
            rounds = [
                one_round(found.program, directory, int(gib * 1024)) for _ in range(args.rounds)
            ]
            result["sizes"].append(summarize(gib, rounds))
    finally:
        shutil.rmtree(directory)
    day = datetime.now(UTC).date().isoformat()
    print(machine.save(f"criu_images-{day}", result, args.out))
    return 0


def checksums() -> dict[str, float]:
    """GB/s of one thread, in pieces that fit into the processor's cache, as images are summed."""
    data = os.urandom(512 * 1024)
    kinds: dict[str, Callable[[bytes], object]] = {
        "crc32": zlib.crc32,
        "blake2b": lambda part: hashlib.blake2b(part).digest(),
        "sha256": lambda part: hashlib.sha256(part).digest(),
    }
    rates = {}
    for name, function in kinds.items():
        begun = time.perf_counter()
        for _ in range(512):
            function(data)
        rates[name] = round(512 * len(data) / (time.perf_counter() - begun) / 1e9, 2)
    return rates


def one_round(criu: Program, directory: Path, mib: int) -> dict[str, float]:
    """Times in seconds, rates of the disk in bytes a second."""
    times = raw(directory, mib * MIB)
    store = ImageStore(directory / "images")
    log = directory / "log"
    log.unlink(missing_ok=True)
    with namespaces(str(log), "0", *PYTHON, "-c", HOLDER, str(mib)) as init:
        wait_for_lines(log, 1)
        with Inside(init) as inside, store.begin("a") as draft:
            begun = time.perf_counter()
            saved = tree.save(criu, inside, draft, name="it", timeout_s=600)
            times["save_before_commit"] = time.perf_counter() - begun
            about = About(
                name="it",
                uid=0,
                created_unix_s=datetime.now(UTC).timestamp(),
                machine=read_machine(criu),
                used=saved.used,
                unnamed=saved.unnamed,
            )
            size = draft.commit(about).size_bytes
            times["save"] = time.perf_counter() - begun
            times["dump_alone"] = saved.dump_s
    times["bytes"] = size
    drop_cache()
    with store.open("a") as image:
        begun = time.perf_counter()
        image.verify()
        times["verify"] = time.perf_counter() - begun
    for kind in ("restore_cold", "restore_cached"):
        if kind == "restore_cold":
            drop_cache()
        times[kind] = restore(criu, store, log)
    store.delete("a")
    store.close()
    return times


def restore(criu: Program, store: ImageStore, log: Path) -> float:
    """Seconds until the process is back, verified and stopped; then it tells its digest once more."""
    lines = log.read_text().splitlines()
    with namespaces() as init, store.open("a") as image, Inside(init) as inside:
        fd = open_log(inside, str(log), 0, 0)
        begun = time.perf_counter()
        back = tree.bring_back(
            criu,
            inside,
            image,
            name="it",
            now=read_machine(criu),
            timeout_s=600,
            inherited={str(log): fd},
        )
        seconds = time.perf_counter() - begun
        os.close(fd)
        run.resume(back.tasks)
        os.kill(back.main.pid, 10)
        wait_for_lines(log, len(lines) + 1)
        assert len(set(log.read_text().splitlines())) == 1, "its memory is not what it was"
    return seconds


def raw(directory: Path, size: int) -> dict[str, float]:
    """Bytes a second of the disk itself, past the page cache; writes end with fsync."""
    rates = {}
    path = directory / "raw"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        for threads in (1, 4):
            for action in ("write", "read"):
                rates[f"raw_{action}_{threads}"] = size / _raw(fd, size, threads, action)
            os.truncate(fd, 0)
    finally:
        os.close(fd)
        path.unlink()
    return rates


def _raw(fd: int, size: int, threads: int, action: str) -> float:
    def work(number: int) -> None:
        buffer = mmap.mmap(-1, BLOCK)
        buffer.write(os.urandom(BLOCK))
        view = memoryview(buffer)
        for offset in range(number * BLOCK, size, threads * BLOCK):
            os.pwrite(fd, view, offset) if action == "write" else os.preadv(fd, [view], offset)

    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    if action == "write":
        os.fsync(fd)
    return time.perf_counter() - begun


@contextmanager
def namespaces(*command: str) -> Iterator[Identity]:
    argv = ["unshare", "--pid", "--mount", "--fork", "--kill-child", *PYTHON, str(INIT), *command]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as unshare:
        try:
            assert unshare.stdout is not None
            assert unshare.stdout.read(5) == b"ready"
            children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text()
            yield proc.identify(int(children))
        finally:
            unshare.kill()


def wait_for_lines(log: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log}: less than {count} lines")
        time.sleep(0.01)


def drop_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def summarize(gib: float, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds as they are; rates in MB/s; and the shares of the raw disk, from the same round each."""
    names = ("dump_alone", "save_before_commit", "save", "verify", "restore_cold", "restore_cached")
    found: dict[str, Any] = {"gib": gib, "image_bytes": int(rounds[0]["bytes"])}
    for name in names:
        found[f"{name}_s"] = machine.summary([one[name] for one in rounds])
        found[f"{name}_mb_s"] = machine.summary([one["bytes"] / one[name] / 1e6 for one in rounds])
    for name in [key for key in rounds[0] if key.startswith("raw_")]:
        found[f"{name}_mb_s"] = machine.summary([one[name] / 1e6 for one in rounds])
    for name, of in (
        ("save", "raw_write_1"),
        ("restore_cold", "raw_read_1"),
        ("verify", "raw_read_4"),
    ):
        shares = [100 * one["bytes"] / one[name] / one[of] for one in rounds]
        found[f"{name}_percent_of_{of}"] = machine.summary(shares)
    return found


if __name__ == "__main__":
    sys.exit(main())
