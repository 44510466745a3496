"""Movers as the driver helper sees them: one for a GPU, started on demand, replaced where one fails.

Covers: starting, asking with deadlines, ending. Does not cover: what a mover does (``mover.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from gpusched import errors
from gpusched.mechanisms.cuda.pool import CHUNK_BYTES, Slice, Snapshot

_MOVER: Final = [sys.executable, "-P", "-m", "gpusched.mechanisms.cuda.mover"]
#: Python, the driver and a context.
_START_S: Final = 60.0
#: The slowest that is still believed to be copying or making memory there.
_LEAST_BYTES_S: Final = 200e6
_PATIENCE_S: Final = 20.0


class Mover:
    """The mover of one GPU. ``job`` makes it one caller's."""

    def __init__(self, gpu: str, directory: Path) -> None:
        self.gpu = gpu
        self._directory = directory
        self._busy = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._open: set[str] = set()

    @contextlib.contextmanager
    def job(self, snapshot: Snapshot) -> Iterator[Mover]:
        """Nobody else's until the end of the block; the chunks of ``snapshot`` are ready. Raises DriverError."""
        with self._busy:
            try:
                self._prepare(snapshot.chunks)
                yield self
            except BaseException:
                self.end()  # whatever it was doing: a new one knows of nothing half done
                raise

    def stage(self, pieces: Sequence[Sequence[Slice]]) -> None:
        """Begins to bring contents onto the GPU for which no memory is there yet. Returns before that is done."""
        self._ask({"op": "stage", "slices": _merged(pieces)}, _PATIENCE_S)

    def take(self, pieces: Sequence[Sequence[Slice]], fds: Sequence[int]) -> None:
        """Memory of another process, and where its contents belong; the descriptors stay the caller's."""
        self._ask({"op": "take", "pieces": _listed(pieces)}, _PATIENCE_S, fds)

    def go(self, *, out: bool) -> None:
        """Begins to copy everything that was taken. Returns before that is done."""
        self._ask({"op": "go", "out": out}, _PATIENCE_S)

    def finish(self, size_bytes: int) -> None:
        """Returns when everything is copied."""
        self._ask({"op": "finish"}, _PATIENCE_S + size_bytes / _LEAST_BYTES_S)

    def forget(self, chunks: Sequence[str]) -> None:
        """Lets go of chunks that are no more."""
        with self._busy:
            known = [name for name in chunks if name in self._open]
            if known and self._process is not None:
                try:
                    self._ask({"op": "close", "chunks": known}, _PATIENCE_S)
                except errors.GpuschedError:
                    self.end()
            self._open.difference_update(known)

    def end_if_idle(self) -> None:
        """Ends it where nobody has a job for it."""
        if self._busy.acquire(blocking=False):
            try:
                self.end()
            finally:
                self._busy.release()

    def end(self) -> None:
        """Kills it. It holds nothing that is not elsewhere."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._process = self._channel = None
        self._open.clear()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    # -- inner

    def _prepare(self, chunks: Sequence[str]) -> None:
        if not self._is_well():
            self.end()
            self._start()
        missing = {name: CHUNK_BYTES for name in chunks if name not in self._open}
        if not missing:
            return
        size = len(missing) * CHUNK_BYTES
        request = {"op": "open", "directory": str(self._directory), "chunks": missing}
        self._ask(request, _START_S + size / _LEAST_BYTES_S)
        self._open.update(missing)

    def _is_well(self) -> bool:
        """Somebody may have killed it since; that shows when it is asked."""
        if self._process is None:
            return False
        try:
            self._ask({"op": "ping"}, _PATIENCE_S)
        except errors.GpuschedError:
            return False
        return True

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        with theirs:
            self._process = subprocess.Popen(
                _MOVER,
                stdin=theirs.fileno(),
                env=environment,
            )
        self._channel = ours

    def _ask(
        self, request: dict[str, Any], timeout_s: float, fds: Sequence[int] = ()
    ) -> dict[str, Any]:
        channel = self._channel
        assert channel is not None
        channel.settimeout(timeout_s)
        begun = time.monotonic()
        try:
            socket.send_fds(channel, [json.dumps(request).encode()], list(fds))
            data = channel.recv(1 << 16)
        except OSError as error:
            raise self._failure(
                request, f"no answer in {time.monotonic() - begun:.0f} s ({error})"
            ) from error
        if not data:
            raise self._failure(request, "it ended")
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise self._failure(request, answer["error"])
        return answer

    def _failure(self, request: dict[str, Any], why: str) -> errors.DriverError:
        return errors.DriverError(
            f"the mover of {self.gpu} failed to {request['op']}: {why}",
            {"call": f"mover {request['op']}", "gpu": self.gpu},
        )


def _listed(pieces: Sequence[Sequence[Slice]]) -> list[list[tuple[str, int, int]]]:
    return [[(s.chunk, s.offset, s.size_bytes) for s in piece] for piece in pieces]


def _merged(pieces: Sequence[Sequence[Slice]]) -> list[list[Any]]:
    """Slices that go on where the last ends, as one: a message has bounds, and thousands of pieces exceed them."""
    found: list[list[Any]] = []
    for one in (slice_ for piece in pieces for slice_ in piece):
        if found and [one.chunk, one.offset] == [found[-1][0], found[-1][1] + found[-1][2]]:
            found[-1][2] += one.size_bytes
        else:
            found.append([one.chunk, one.offset, one.size_bytes])
    return found


class Movers:
    """By the UUID of the GPU."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._movers: dict[str, Mover] = {}

    def of(self, gpu: str) -> Mover:
        with self._lock:
            return self._movers.setdefault(gpu, Mover(gpu, self._directory))

    def all(self) -> list[Mover]:
        with self._lock:
            return list(self._movers.values())

    def end(self) -> None:
        for mover in self.all():
            mover.end()
