"""The daemon's side of the driver helper: implements ``ports.Driver`` over ``driver_host`` processes.

A call that passes its deadline is not taken back: nobody can. Its helper is retired (it gets no new calls and is
ended when its other calls are done) and the next call starts a fresh one. A helper that dies fails the calls it had;
whether they happened is for ``states`` to tell.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from gpusched import errors
from gpusched.ports import Description, DriverState, Obstacle, Took, Usage

log = logging.getLogger(__name__)

#: For calls that only look: the driver answers in microseconds, NVML in milliseconds.
LOOK_DEADLINE_S: Final = 10.0
#: A new helper opens the driver before its first answer: up to seconds for each GPU without persistence mode.
OPEN_DEADLINE_S: Final = 60.0
UNLOCK_DEADLINE_S: Final = 60.0
#: The driver keeps a lock's time itself; this much later we notice one that does not.
LOCK_MARGIN_S: Final = 30.0
#: A retired helper is killed after this long, hung call or not.
RETIRE_S: Final = 600.0
#: An answer is one line; a listing of thousands of processes fits.
LINE_LIMIT: Final = 16 * 1024 * 1024

T = TypeVar("T")


def _as(type_: type[T], raw: msgspec.Raw) -> T:
    return msgspec.json.Decoder(type_).decode(raw)


class _How(msgspec.Struct):
    seconds: float
    path: str
    phases_ms: dict[str, float]


def _took(raw: msgspec.Raw) -> Took:
    answer = _as(_How, raw)
    return Took.how(answer.seconds, answer.path, answer.phases_ms)


class _Answer(msgspec.Struct):
    id: int
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: dict[str, Any] | None = None


class _Helper:
    """One helper process and the calls it is working on."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self.has_answered = False
        self.retired = False

    def __repr__(self) -> str:
        state = "retired" if self.retired else "serving"
        return f"<driver helper pid {self.process.pid} {state}, {len(self.waiting)} calls>"

    async def read_answers(self) -> None:
        """Hands answers to their callers until the process ends; then fails what is left.

        Cancelling it, as the daemon does at its end, leaves the process to finish its calls.
        """
        try:
            await self._read_answers()
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("driver helper talks nonsense pid=%d: %s", self.process.pid, error)
            self.kill()
        finally:
            self.retired = True
        code = await self.process.wait()
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(
                    errors.Unavailable(
                        f"the driver helper (pid {self.process.pid}) ended in the middle of a call "
                        f"(status {code}); the next call starts a new one",
                        {"helper_pid": self.process.pid, "helper_status": code},
                    )
                )
        self.waiting.clear()

    async def _read_answers(self) -> None:
        assert self.process.stdout is not None
        decoder = msgspec.json.Decoder(_Answer)
        while line := await self.process.stdout.readline():
            answer = decoder.decode(line)
            self.has_answered = True
            future = self.waiting.pop(answer.id, None)
            if future is None or future.done():
                continue
            if answer.error is not None:
                future.set_exception(errors.from_wire(answer.error))
            else:
                future.set_result(answer.result)
            if self.retired and not self.waiting:
                self.kill()

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


class DriverClient:
    """``ports.Driver``: every call goes to the current helper, started on demand."""

    def __init__(
        self, options: Sequence[str], tasks: asyncio.TaskGroup, keep_open: Sequence[int] = ()
    ) -> None:
        """``options`` are ``driver_host``'s command line; ``tasks`` owns the readers.

        The descriptors ``keep_open`` stay open in every helper for as long as it lives.
        """
        self._options = tuple(options)
        self._keep_open = tuple(keep_open)
        self._tasks = tasks
        self._ids = itertools.count(1)
        self._helper: _Helper | None = None
        self._starting = asyncio.Lock()
        self._description: Description | None = None
        self._closed = False

    @property
    def helper_pid(self) -> int | None:
        """The pid of the helper that serves new calls, if one runs."""
        return self._helper.process.pid if self._helper and not self._helper.retired else None

    async def describe(self) -> Description:
        if self._description is None:
            self._description = _as(Description, await self._call("describe", {}, LOOK_DEADLINE_S))
        return self._description

    async def usage(self) -> Usage:
        return _as(Usage, await self._call("usage", {}, LOOK_DEADLINE_S))

    async def states(self, pids: Sequence[int]) -> dict[int, DriverState]:
        if not pids:
            return {}
        raw = await self._call("states", {"pids": list(pids)}, LOOK_DEADLINE_S)
        return _as(dict[int, DriverState], raw)

    async def lock(self, pid: int, timeout_s: float) -> float:
        args = {"pid": pid, "timeout_s": timeout_s}
        return _as(float, await self._call("lock", args, timeout_s + LOCK_MARGIN_S))

    async def checkpoint(self, pid: int, deadline_s: float, *, keep_context: bool = False) -> Took:
        args = {"pid": pid, "keep_context": keep_context}
        return _took(await self._call("checkpoint", args, deadline_s))

    async def restore(self, pid: int, gpu_map: Mapping[str, str] | None, deadline_s: float) -> Took:
        args = {"pid": pid, "gpu_map": None if gpu_map is None else dict(gpu_map)}
        return _took(await self._call("restore", args, deadline_s))

    async def unlock(self, pid: int) -> float:
        return _as(float, await self._call("unlock", {"pid": pid}, UNLOCK_DEADLINE_S))

    async def absorb(self, pid: int, deadline_s: float) -> float:
        return _as(float, await self._call("absorb", {"pid": pid}, deadline_s))

    async def obstacles(self, pids: Sequence[int]) -> list[Obstacle]:
        raw = await self._call("obstacles", {"pids": list(pids)}, LOOK_DEADLINE_S)
        return _as(list[Obstacle], raw)

    def close(self) -> None:
        """Ends the helper once its calls are done (its standard input closes). Does not wait."""
        self._closed = True
        if self._helper and self._helper.process.stdin:
            self._helper.process.stdin.close()

    async def wait_closed(self) -> None:
        """After ``close``: returns when the helper has ended, which takes as long as its calls."""
        if self._helper is not None:
            await self._helper.process.wait()

    async def _call(self, call: str, args: dict[str, Any], deadline_s: float) -> msgspec.Raw:
        helper = await self._current()
        request_id = next(self._ids)
        future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        helper.waiting[request_id] = future
        if not helper.has_answered:
            deadline_s += OPEN_DEADLINE_S
        assert helper.process.stdin is not None
        helper.process.stdin.write(
            msgspec.json.encode({"id": request_id, "call": call, "args": args}) + b"\n"
        )
        try:
            async with asyncio.timeout(deadline_s):
                raw = await future
        except TimeoutError:
            self._retire(helper)
            raise errors.DeadlineExceeded(
                f"the driver did not finish {call} of pid {args.get('pid', '-')} in {deadline_s:.0f} s; "
                "it may still do so",
                {"call": call, "deadline_s": deadline_s, **args},
            ) from None
        return raw

    async def _current(self) -> _Helper:
        async with self._starting:
            if self._helper is None or self._helper.retired:
                if self._closed:
                    raise errors.ShuttingDown("the daemon is shutting down")
                self._helper = await self._start()
            return self._helper

    async def _start(self) -> _Helper:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # root must not import what lies in whatever directory it was started in
                "-m",
                "gpusched.mechanisms.driver_host",
                *self._options,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=self._keep_open,
                # It serves every GPU, whatever was meant for programs that are started from the same shell.
                env={k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"},
                limit=LINE_LIMIT,
            )
        except OSError as error:
            raise errors.Unavailable(
                f"cannot start the driver helper: {error.strerror}; the host has no process, memory or "
                "descriptor left"
            ) from error
        helper = _Helper(process)
        log.info("driver helper started pid=%d", process.pid)
        self._tasks.create_task(helper.read_answers(), name=f"driver-helper-{process.pid}")
        return helper

    def _retire(self, helper: _Helper) -> None:
        """No new calls for ``helper``; it ends when the others are done, at the latest after RETIRE_S."""
        log.warning(
            "driver helper retired pid=%d calls=%d", helper.process.pid, len(helper.waiting)
        )
        helper.retired = True
        live = [f for f in helper.waiting.values() if not f.done()]
        if live:
            asyncio.get_running_loop().call_later(RETIRE_S, helper.kill)
        else:
            helper.kill()
