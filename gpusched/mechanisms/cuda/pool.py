"""Host memory for what has left the GPU: files in memory, in equal chunks, that outlive whoever copies.

Covers: chunks, which process has which, what was copied where. Does not cover: copying (``mover.py``).

The directory is the owner's alone and on a tmpfs. A chunk is a file; a manifest beside the chunks says which process
(pid and start time) has what where, and whether all of it is there. So a driver helper that starts anew knows
everything that the last one did. Chunks without a manifest hold nothing.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final

from gpusched import errors
from gpusched.units import MIB, format_size

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 512 * MIB
#: What stays free for the rest of the host when a chunk is made.
RESERVE_BYTES: Final = 1024 * MIB
_READ_BYTES: Final = 8 * MIB


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a chunk."""

    chunk: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The contents of one process, laid out one piece after the other over its chunks."""

    pid: int
    start_ticks: int
    chunks: tuple[str, ...]
    #: Of the pieces, in their order: places in the process's table, GPUs (UUIDs) and bytes.
    places: tuple[int, ...]
    gpus: tuple[str, ...]
    sizes: tuple[int, ...]
    complete: bool
    #: Whether the process has given up what kept its memory alive while it was copied.
    let_go: bool = False
    #: Of the chunks, so many at the beginning are in the process's own memory and no more here.
    absorbed: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes)

    def by_gpu(self) -> dict[str, dict[int, list[Slice]]]:
        """UUID -> place -> where the contents of that piece are."""
        found: dict[str, dict[int, list[Slice]]] = {}
        for place, gpu, slices in zip(self.places, self.gpus, self.slices(), strict=True):
            found.setdefault(gpu, {})[place] = slices
        return found

    def slices(self) -> Iterator[list[Slice]]:
        """Where each piece is, in order."""
        position = 0
        for size in self.sizes:
            parts = []
            while size > 0:
                number, offset = divmod(position, CHUNK_BYTES)
                part = min(size, CHUNK_BYTES - offset)
                parts.append(Slice(self.chunks[number], offset, part))
                position, size = position + part, size - part
            yield parts


_FIELDS: Final = {field.name for field in fields(Snapshot)}


class Pool:
    """All chunks of one daemon. Safe from many threads."""

    def __init__(self, directory: Path, *, of_another: bool = False) -> None:
        """Takes over what the last one left. Raises OSError. ``of_another``: only looks, and clears nothing away."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self._lock = threading.Lock()
        self._snapshots: dict[tuple[int, int], Snapshot] = {}
        self._free: list[str] = []
        self._next = 0
        self._recover(clear=not of_another)

    def take(self, pid: int, start_ticks: int, pieces: Sequence[tuple[int, str, int]]) -> Snapshot:
        """Room for ``pieces`` (place, GPU, bytes); not complete yet.

        Raises InsufficientHostMemory, OSError; nothing was taken then.
        """
        sizes = tuple(size for _, _, size in pieces)
        need = -(-sum(sizes) // CHUNK_BYTES)
        with self._lock:
            self._discard(pid, start_ticks)
            make = max(0, need - len(self._free))
            room = min(_available_bytes(), self._free_on_disk()) - RESERVE_BYTES
            if make * CHUNK_BYTES > room:
                raise errors.InsufficientHostMemory(
                    f"the contents of process {pid} need {format_size(make * CHUNK_BYTES)} more of host memory and "
                    f"{format_size(max(0, room))} may be taken"
                )
            for _ in range(make):
                self._free.append(self._make())
            chunks = tuple(self._free.pop() for _ in range(need))
            snapshot = Snapshot(
                pid=pid,
                start_ticks=start_ticks,
                chunks=chunks,
                places=tuple(place for place, _, _ in pieces),
                gpus=tuple(gpu for _, gpu, _ in pieces),
                sizes=sizes,
                complete=False,
            )
            self._write(snapshot)
            return snapshot

    def complete(self, snapshot: Snapshot) -> None:
        """All of it is there."""
        with self._lock:
            self._write(replace(snapshot, complete=True))

    def let_go(self, pid: int, start_ticks: int) -> None:
        """See ``Snapshot``. Nothing where there is none."""
        with self._lock:
            found = self._snapshots.get((pid, start_ticks))
            if found is not None:
                self._write(replace(found, let_go=True))

    def absorbed(self, snapshot: Snapshot) -> Snapshot:
        """One chunk more of it is in the process's own memory; the chunk is given back to the host."""
        with self._lock:
            more = replace(snapshot, absorbed=snapshot.absorbed + 1)
            self._write(more)
            (self.directory / snapshot.chunks[snapshot.absorbed]).unlink(missing_ok=True)
            return more

    def read(self, snapshot: Snapshot, number: int) -> Iterator[bytes]:
        """The contents of one of its chunks, some at a time. Raises OSError."""
        left = min(CHUNK_BYTES, snapshot.size_bytes - number * CHUNK_BYTES)
        with (self.directory / snapshot.chunks[number]).open("rb", buffering=0) as chunk:
            while left > 0 and (data := chunk.read(min(left, _READ_BYTES))):
                left -= len(data)
                yield data

    def find(self, pid: int, start_ticks: int) -> Snapshot | None:
        with self._lock:
            return self._snapshots.get((pid, start_ticks))

    def release(self, pid: int, start_ticks: int) -> None:
        """The contents are elsewhere, or nobody's any more."""
        with self._lock:
            self._discard(pid, start_ticks)

    def snapshots(self) -> list[Snapshot]:
        with self._lock:
            return list(self._snapshots.values())

    def trim(self) -> list[str]:
        """Gives back every chunk that holds nothing; their names, for who has them open."""
        with self._lock:
            gone, self._free = self._free, []
            for chunk in gone:
                (self.directory / chunk).unlink(missing_ok=True)
            return gone

    @property
    def free_bytes(self) -> int:
        with self._lock:
            return len(self._free) * CHUNK_BYTES

    # -- with the lock held

    def _free_on_disk(self) -> int:
        about = os.statvfs(self.directory)
        return about.f_bavail * about.f_frsize

    def _make(self) -> str:
        self._next += 1
        name = f"chunk-{self._next}"
        path = self.directory / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, CHUNK_BYTES)
        finally:
            os.close(fd)
        return name

    def _discard(self, pid: int, start_ticks: int) -> None:
        found = self._snapshots.pop((pid, start_ticks), None)
        if found is not None:
            self._manifest(pid, start_ticks).unlink(missing_ok=True)
            self._free.extend(found.chunks[found.absorbed :])

    def _manifest(self, pid: int, start_ticks: int) -> Path:
        return self.directory / f"process-{pid}-{start_ticks}.json"

    def _write(self, snapshot: Snapshot) -> None:
        path = self._manifest(snapshot.pid, snapshot.start_ticks)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(snapshot)))
        partial.replace(path)
        self._snapshots[snapshot.pid, snapshot.start_ticks] = snapshot

    def _recover(self, *, clear: bool) -> None:
        for path in self.directory.glob("process-*.json"):
            try:
                found = json.loads(path.read_text())
                found = {
                    key: found[key] for key in found.keys() & _FIELDS
                }  # another version has others
                lists = {key: tuple(found[key]) for key in ("chunks", "places", "gpus", "sizes")}
                snapshot = Snapshot(**(found | lists))
            except (ValueError, KeyError, TypeError) as error:
                # Somebody's contents, perhaps of another version: whose chunks they are in, nobody can say.
                log.warning("%s cannot be read (%s); chunks stay as they are", path, error)
                clear = False
                continue
            self._snapshots[snapshot.pid, snapshot.start_ticks] = snapshot
        taken = {chunk for snapshot in self._snapshots.values() for chunk in snapshot.chunks}
        for path in self.directory.glob("chunk-*"):
            self._next = max(self._next, int(path.name.removeprefix("chunk-")))
            if clear and path.name not in taken:
                path.unlink()


def spare_bytes(directory: Path) -> int:
    """What the chunks of a pool that is somebody else's have room for. 0 where there is none."""
    try:
        names = [path.name for path in directory.iterdir()]
        taken = 0
        for name in names:
            if name.startswith("process-") and name.endswith(".json"):
                found = json.loads((directory / name).read_text())
                taken += len(found["chunks"]) - found["absorbed"]
    except (OSError, ValueError, KeyError):
        return 0
    there = sum(name.startswith("chunk-") for name in names)
    return max(0, there - taken) * CHUNK_BYTES


def _available_bytes() -> int:
    with Path("/proc/meminfo").open() as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
