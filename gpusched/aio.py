"""The asyncio SDK: ``AsyncGpuSched``. Standard library only; see docs/sdk.md.

Covers: the client's methods as coroutines, leases and streams. Each method means what its namesake in ``client.py``
does and is described there. What is asked is in ``_requests.py``, how it waits in ``_async_io.py``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from gpusched import _requests, errors
from gpusched._async_io import Connection, Pool
from gpusched._channel import Lost

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from gpusched import types

T = TypeVar("T")
F = TypeVar("F")


class AsyncStream(Generic[T, F]):
    """Items that the daemon sends until either side closes; an asynchronous iterator and context manager.

    It opens with ``async with``, or at the first item. Waiting for an item may be cancelled and tried again.

    Attributes:
        first: The response that opened the stream (for ``events()``: the status at that moment).
    """

    first: F

    def __init__(self, pool: Pool, request: _requests.StreamRequest[T, F]) -> None:
        self._pool = pool
        self._request = request
        self._connection: Connection | None = None
        self._before: list[T] = []

    async def _open(self) -> Connection:
        connection = await self._pool.open()
        try:
            self.first = await self._pool.ask_on(connection, self._request.opening)
            self._before = list(reversed(list(self._request.before(self.first))))
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        connection = self._connection or await self._open()
        if self._before:
            return self._before.pop()
        try:
            line = await connection.read_line()
        except Lost:
            connection.close()
            raise StopAsyncIteration from None
        return _requests.item_of(self._request, line)

    async def close(self) -> None:
        """Ends the iteration, also one that waits in another task."""
        if self._connection is not None:
            self._connection.close()

    async def __aenter__(self) -> Self:
        if self._connection is None:
            await self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncLease:
    """The right of some processes to stay on the GPU; made by ``AsyncGpuSched.on_gpu``.

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

    async def __aenter__(self) -> Self:
        if self._connection is not None:
            raise errors.InvalidRequest(f"this lease on {', '.join(self.names)} is already held")
        connection = self._connection = await self._pool.open()
        try:
            for name in self.names:
                request = _requests.acquire(name, None, self._evict)
                self.acquired[name] = await self._pool.ask_on(connection, request)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the lease; when this returns, the daemon has taken note. May be called twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.finish()


class AsyncGpuSched:
    """An asyncio client of the gpusched daemon. Tasks may share one: each waiting call has a connection of its own.

    Arguments, results and errors are those of ``gpusched.GpuSched``. Cancelling a call ends the waiting, not the
    action.
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
        return f"<AsyncGpuSched {self.socket_path} [{len(self._pool)} idle, {len(self._leases)} leases]>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections, which ends what ``acquire`` holds. The client may be used again."""
        while self._leases:
            await self._leases.pop()[1].finish()
        self._pool.close()

    # -- processes ------------------------------------------------------------------------------

    async def run(
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
        return await self._pool.send(
            _requests.run(name, cmd, gpu, gpus, dir, env, evictable, isolate)
        )

    async def adopt(
        self, pid: int, name: str, *, evictable: bool = False, stop: bool = True
    ) -> types.AdoptResult:
        return await self._pool.send(_requests.adopt(pid, name, evictable, stop))

    async def freeze(
        self, name: str, *, force: bool = False, keep_context: bool = False
    ) -> types.FreezeResult:
        return await self._pool.send(_requests.freeze(name, force, keep_context))

    async def thaw(self, name: str, *, evict: bool = False) -> types.ThawResult:
        return await self._pool.send(_requests.thaw(name, evict))

    async def kill(self, name: str, *, force: bool = False) -> types.KillResult:
        return await self._pool.send(_requests.kill(name, force))

    async def hibernate(self, name: str, *, force: bool = False) -> types.FreezeResult:
        return await self._pool.send(_requests.hibernate(name, force))

    async def snapshots(self) -> types.SnapshotsResult:
        return await self._pool.send(_requests.snapshots())

    async def verify_snapshot(self, name: str) -> types.SnapshotResult:
        return await self._pool.send(_requests.verify_snapshot(name))

    async def delete_snapshot(self, name: str) -> types.SnapshotResult:
        return await self._pool.send(_requests.delete_snapshot(name))

    async def migrate(
        self,
        name: str,
        gpu: int | None = None,
        *,
        gpus: Sequence[int] | None = None,
        force: bool = False,
    ) -> types.MigrateResult:
        return await self._pool.send(_requests.migrate(name, gpu, gpus, force))

    async def fork(
        self,
        name: str,
        copies: int = 2,
        gpus: Sequence[int] | None = None,
        *,
        force: bool = False,
    ) -> types.ForkResult:
        return await self._pool.send(_requests.fork(name, copies, gpus, force))

    @overload
    async def swap(
        self, off: str, on: str, *, force: bool = False, keep_context: bool = False
    ) -> tuple[types.FreezeResult, types.ThawResult]: ...
    @overload
    async def swap(
        self,
        off: list[str] | tuple[str, ...],
        on: list[str] | tuple[str, ...],
        *,
        force: bool = False,
        keep_context: bool = False,
    ) -> tuple[list[types.FreezeResult], list[types.ThawResult]]: ...
    @overload
    async def swap(
        self,
        off: str | list[str] | tuple[str, ...],
        on: str | list[str] | tuple[str, ...],
        *,
        force: bool = False,
        keep_context: bool = False,
    ) -> tuple[Any, Any]: ...
    async def swap(
        self,
        off: str | list[str] | tuple[str, ...],
        on: str | list[str] | tuple[str, ...],
        *,
        force: bool = False,
        keep_context: bool = False,
    ) -> tuple[Any, Any]:
        return await self._pool.send(_requests.swap(off, on, force, keep_context))

    # -- leases ---------------------------------------------------------------------------------

    async def acquire(
        self, name: str, *, for_s: float | None = None, evict: bool = False
    ) -> types.AcquireResult:
        request = _requests.acquire(name, for_s, evict)
        if for_s is not None:
            return await self._pool.send(request)
        connection = await self._pool.open()
        try:
            result = await self._pool.ask_on(connection, request)
        except BaseException:
            connection.close()
            raise
        self._leases.append((name, connection))
        return result

    async def release(self, name: str) -> types.ReleaseResult:
        held = [connection for leased, connection in self._leases if leased == name]
        self._leases = [lease for lease in self._leases if lease[0] != name]
        own = [
            connection for connection in held if connection.is_own
        ]  # a forked child drops its copies
        for connection in held:
            await connection.finish()
        result = await self._pool.send(_requests.release(name))
        return {**result, "released": result["released"] + len(own)}

    def on_gpu(self, *names: str, evict: bool = False) -> AsyncLease:
        """``async with client.on_gpu("policy"):`` keeps processes on the GPU for the length of a block."""
        return AsyncLease(self._pool, names, evict=evict)

    # -- looking --------------------------------------------------------------------------------

    async def status(self) -> types.Status:
        return await self._pool.send(_requests.status())

    async def processes(self) -> list[types.ProcessStatus]:
        return (await self.status())["processes"]

    async def gpu_free_mb(self, gpu: int = 0) -> int:
        return _requests.free_mb(await self.status(), gpu)

    async def wait_ready(
        self, name: str, timeout: float = 120.0, poll: float = 2.0
    ) -> types.ProcessStatus:
        deadline = time.monotonic() + timeout
        readiness = _requests.Readiness(name)
        while True:
            remaining = deadline - time.monotonic()
            try:
                # Even at the last look the daemon gets a second to answer.
                status = await self._pool.send(
                    _requests.status(), min(self._pool.timeout_s, max(1.0, remaining))
                )
            except errors.DeadlineExceeded:
                raise readiness.late(timeout) from None
            if (process := readiness.check(status)) is not None:
                return process
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise readiness.late(timeout)
            await asyncio.sleep(min(poll, remaining))

    async def logs(self, name: str, lines: int = 50) -> types.LogsResult:
        return await self._pool.send(_requests.logs(name, lines))

    def follow_logs(self, name: str, lines: int = 50) -> AsyncStream[str, types.LogsResult]:
        """The last lines, then each new one: ``async for line in client.follow_logs(name)``."""
        return AsyncStream(self._pool, _requests.follow_logs(name, lines))

    def events(self) -> AsyncStream[types.Event, types.Status]:
        """What happens from now on: ``async for event in client.events()``."""
        return AsyncStream(self._pool, _requests.events())

    async def call(self, method: str, /, **params: Any) -> Any:
        return await self._pool.send(_requests.call(method, params))
