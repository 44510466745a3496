"""The synchronous SDK: ``GpuSched``. Standard library only; see docs/sdk.md.

Covers: the client's methods, leases and streams. What is asked is in ``_requests.py``, how it waits in ``_sync_io.py``;
the asyncio twin is ``aio.py``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from gpusched import _requests, errors
from gpusched._channel import Lost
from gpusched._sync_io import Connection, Pool

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from gpusched import types

T = TypeVar("T")
F = TypeVar("F")


class Stream(Generic[T, F]):
    """Items that the daemon sends until either side closes; an iterator and a context manager.

    Waits for the next item without limit. ``close()`` may come from another thread and ends the iteration.

    Attributes:
        first: The response that opened the stream (for ``events()``: the status at that moment).
    """

    def __init__(
        self, connection: Connection, request: _requests.StreamRequest[T, F], first: F
    ) -> None:
        self.first = first
        self._connection = connection
        self._request = request
        self._before = iter(request.before(first))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        for item in self._before:
            return item
        try:
            line = self._connection.read_line(None)
        except Lost:
            self.close()
            raise StopIteration from None
        return _requests.item_of(self._request, line)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Lease:
    """The right of some processes to stay on the GPU; made by ``GpuSched.on_gpu``, held between enter and exit.

    It lives on a connection of its own, so that it also ends when this program does.

    Attributes:
        names: The processes it covers.
        acquired: The daemon's answer for each name, once held.
    """

    def __init__(self, pool: Pool, names: Sequence[str], *, evict: bool) -> None:
        self.names = tuple(names)
        self.acquired: dict[str, types.AcquireResult] = {}
        self._pool = pool
        self._evict = evict
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        if self._connection is not None:
            raise errors.InvalidRequest(f"this lease on {', '.join(self.names)} is already held")
        connection = self._connection = self._pool.open()
        try:
            for name in self.names:
                request = _requests.acquire(name, None, self._evict)
                self.acquired[name] = self._pool.ask_on(connection, request)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the lease; when this returns, the daemon has taken note. May be called twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.finish()


class GpuSched:
    """A client of the gpusched daemon. Threads may share one: each waiting call has a connection of its own.

    Connections are opened when needed and kept for reuse. Every method blocks until the daemon answers and raises
    ``errors.DaemonUnavailable`` (a ``ConnectionError``) when it does not run, ``errors.DeadlineExceeded`` after
    ``timeout_s``, and otherwise the class of ``gpusched.errors`` that the daemon's answer names.

    Args:
        socket_path: Where the daemon listens; by default ``$GPUSCHED_SOCKET``, else ``/tmp/gpusched.sock``.
        timeout_s: Seconds to wait for each response.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        *,
        timeout_s: float = _requests.RESPONSE_TIMEOUT_S,
    ) -> None:
        self._pool = Pool(_requests.socket_path(socket_path), timeout_s)
        self._leases: list[tuple[str, Connection]] = []

    @property
    def socket_path(self) -> str:
        return self._pool.path

    def __repr__(self) -> str:
        return f"<GpuSched {self.socket_path} [{len(self._pool)} idle, {len(self._leases)} leases]>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections, which ends what ``acquire`` holds. The client may be used again."""
        while self._leases:
            self._leases.pop()[1].finish()
        self._pool.close()

    # -- processes ------------------------------------------------------------------------------

    def run(
        self,
        name: str,
        cmd: Sequence[str | os.PathLike[str]],
        gpu: int = 0,
        *,
        gpus: Sequence[int] | None = None,
        dir: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        evictable: bool = False,
        isolate: bool | None = None,
    ) -> types.RunResult:
        """Starts a command on GPU ``gpu`` (or all of ``gpus``), in the caller's folder and environment by default.

        ``evictable``: others who need the VRAM may freeze it. ``isolate``: in namespaces of its own, which saving it
        to disk needs; by default as the daemon was told.
        """
        return self._pool.send(_requests.run(name, cmd, gpu, gpus, dir, env, evictable, isolate))

    def adopt(
        self, pid: int, name: str, *, evictable: bool = False, stop: bool = True
    ) -> types.AdoptResult:
        """Takes over a running process and its descendants.

        ``stop``: a freeze stops its CPU threads too. Without, its CUDA calls wait and all else in it goes on.
        """
        return self._pool.send(_requests.adopt(pid, name, evictable, stop))

    def freeze(
        self, name: str, *, force: bool = False, keep_context: bool = False
    ) -> types.FreezeResult:
        """Moves VRAM to host RAM and stops the process. A frozen one: a success, ``duration_ms`` 0.

        With ``keep_context`` the CUDA context may stay on the GPU, which is faster both ways: the result's
        ``context_mb`` says how much that takes, and it goes by itself when somebody needs the room.
        """
        return self._pool.send(_requests.freeze(name, force, keep_context))

    def thaw(self, name: str, *, evict: bool = False) -> types.ThawResult:
        """Brings a process back onto its GPUs; with ``evict`` others make room for it."""
        return self._pool.send(_requests.thaw(name, evict))

    def kill(self, name: str, *, force: bool = False) -> types.KillResult:
        """Ends a process (SIGTERM, later SIGKILL) and forgets its name."""
        return self._pool.send(_requests.kill(name, force))

    def hibernate(self, name: str, *, force: bool = False) -> types.FreezeResult:
        """Moves a process to disk; ``thaw`` brings it back. Without a disk tier: ``errors.Unsupported``."""
        return self._pool.send(_requests.hibernate(name, force))

    def migrate(
        self,
        name: str,
        gpu: int | None = None,
        *,
        gpus: Sequence[int] | None = None,
        force: bool = False,
    ) -> types.MigrateResult:
        """Moves a process to GPU ``gpu`` (or ``gpus``); it is active there afterwards."""
        return self._pool.send(_requests.migrate(name, gpu, gpus, force))

    def fork(
        self,
        name: str,
        copies: int = 2,
        gpus: Sequence[int] | None = None,
        *,
        force: bool = False,
    ) -> types.ForkResult:
        """Makes running copies, ``NAME-1`` and so on, on ``gpus`` by turns; the original goes on as it was.

        Each copy has a network of its own. ``force``: also where copies would share files open for writing.
        """
        return self._pool.send(_requests.fork(name, copies, gpus, force))

    def snapshots(self) -> types.SnapshotsResult:
        """The snapshots on disk of one's own processes."""
        return self._pool.send(_requests.snapshots())

    def verify_snapshot(self, name: str) -> types.SnapshotResult:
        """Reads all of a process's snapshot; ``errors.CriuError`` where it is not what was written."""
        return self._pool.send(_requests.verify_snapshot(name))

    def delete_snapshot(self, name: str) -> types.SnapshotResult:
        """Deletes a snapshot that its process, which lives, does not need any more."""
        return self._pool.send(_requests.delete_snapshot(name))

    @overload
    def swap(
        self, off: str, on: str, *, force: bool = False, keep_context: bool = False
    ) -> tuple[types.FreezeResult, types.ThawResult]: ...
    @overload
    def swap(
        self,
        off: list[str] | tuple[str, ...],
        on: list[str] | tuple[str, ...],
        *,
        force: bool = False,
        keep_context: bool = False,
    ) -> tuple[list[types.FreezeResult], list[types.ThawResult]]: ...
    @overload
    def swap(
        self,
        off: str | list[str] | tuple[str, ...],
        on: str | list[str] | tuple[str, ...],
        *,
        force: bool = False,
        keep_context: bool = False,
    ) -> tuple[Any, Any]: ...
    def swap(
        self,
        off: str | list[str] | tuple[str, ...],
        on: str | list[str] | tuple[str, ...],
        *,
        force: bool = False,
        keep_context: bool = False,
    ) -> tuple[Any, Any]:
        """Freezes ``off`` and thaws ``on`` as one operation, rolled back whole.

        Returns the results of both sides, each as it was given: one name one dict, several a list of dicts.
        """
        return self._pool.send(_requests.swap(off, on, force, keep_context))

    # -- leases ---------------------------------------------------------------------------------

    def acquire(
        self, name: str, *, for_s: float | None = None, evict: bool = False
    ) -> types.AcquireResult:
        """Brings a process onto the GPU and keeps it there until ``release`` or ``close``, or for ``for_s`` seconds.

        A lease with a time outlives this client; one without lives on a connection that this call opens.
        """
        request = _requests.acquire(name, for_s, evict)
        if for_s is not None:
            return self._pool.send(request)
        connection = self._pool.open()
        try:
            result = self._pool.ask_on(connection, request)
        except BaseException:
            connection.close()
            raise
        self._leases.append((name, connection))
        return result

    def release(self, name: str) -> types.ReleaseResult:
        """Ends the caller's leases on a process; ``released`` counts them. None held is a success too."""
        held = 0
        for lease in [lease for lease in self._leases if lease[0] == name]:
            with contextlib.suppress(ValueError):  # another thread was faster
                self._leases.remove(lease)
                lease[1].finish()
                held += lease[1].is_own  # a forked child only drops its copy
        result = self._pool.send(_requests.release(name))
        return {**result, "released": result["released"] + held}

    def on_gpu(self, *names: str, evict: bool = False) -> Lease:
        """``with gs.on_gpu("policy"):`` keeps processes on the GPU for the length of a block.

        They are thawed on entry, one after the other; nothing is frozen on exit. Also ends when this program ends.
        """
        return Lease(self._pool, names, evict=evict)

    # -- looking --------------------------------------------------------------------------------

    def status(self) -> types.Status:
        """GPUs, processes, memory, metrics and recent events. Never waits for a freeze."""
        return self._pool.send(_requests.status())

    def processes(self) -> list[types.ProcessStatus]:
        """The managed processes."""
        return self.status()["processes"]

    def gpu_free_mb(self, gpu: int = 0) -> int:
        """Free VRAM in MiB. Raises NotFound for an index that the host does not have."""
        return _requests.free_mb(self.status(), gpu)

    def wait_ready(
        self, name: str, timeout: float = 120.0, poll: float = 2.0
    ) -> types.ProcessStatus:
        """Waits until a process holds VRAM, asking every ``poll`` seconds.

        A name that does not exist yet is waited for. Raises ProcessExited as soon as the process is dead or failed,
        TimeoutError after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        readiness = _requests.Readiness(name)
        while True:
            remaining = deadline - time.monotonic()
            try:
                # Even at the last look the daemon gets a second to answer.
                status = self._pool.send(
                    _requests.status(), min(self._pool.timeout_s, max(1.0, remaining))
                )
            except errors.DeadlineExceeded:
                raise readiness.late(timeout) from None
            if (process := readiness.check(status)) is not None:
                return process
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise readiness.late(timeout)
            time.sleep(min(poll, remaining))

    def logs(self, name: str, lines: int = 50) -> types.LogsResult:
        """The last lines a process wrote (0: 50, negative: all), as ``lines`` and joined as ``output``."""
        return self._pool.send(_requests.logs(name, lines))

    def follow_logs(self, name: str, lines: int = 50) -> Stream[str, types.LogsResult]:
        """The last lines, then each new one as it is written."""
        return self._stream(_requests.follow_logs(name, lines))

    def events(self) -> Stream[types.Event, types.Status]:
        """What happens from now on, one dict for each event; ``first`` holds the status at the start."""
        return self._stream(_requests.events())

    def call(self, method: str, /, **params: Any) -> Any:
        """Any method of the wire, for what has no method here. Parameters that are None are left out."""
        return self._pool.send(_requests.call(method, params))

    def _stream(self, request: _requests.StreamRequest[T, F]) -> Stream[T, F]:
        connection = self._pool.open()
        try:
            return Stream(connection, request, self._pool.ask_on(connection, request.opening))
        except BaseException:
            connection.close()
            raise
