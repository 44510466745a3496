"""What the SDK asks and how it reads the answers: shared by both clients, without any I/O.

Covers: one function for each request, the response envelope, which requests may be sent twice, readiness, and the texts
of errors that only a client can raise. Does not cover: sockets (``_channel.py``).

Standard library only, and no ``dataclasses``: importing that takes longer than asking for a status.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from gpusched import errors
from gpusched.protocol import codec

if TYPE_CHECKING:
    from gpusched import types

T = TypeVar("T")
F = TypeVar("F")

DEFAULT_SOCKET: Final = "/tmp/gpusched.sock"  # noqa: S108 - the wire's promise; the peer's uid is checked
#: Seconds to wait for a connection to be accepted into the daemon's queue.
CONNECT_TIMEOUT_S: Final = 5.0
#: Seconds to wait for a response: moving a large model may take minutes.
RESPONSE_TIMEOUT_S: Final = 900.0
#: Idle connections that a client keeps.
MAX_IDLE: Final = 4

#: Methods whose goal, once reached, is a success: they may be sent again when an answer was lost. The protocol's table
#: says the same (a test compares them), but reading that table needs a package that the SDK must do without.
IDEMPOTENT: Final = frozenset(
    {
        *("freeze", "thaw", "hibernate", "swap", "migrate", "release"),
        *("status", "logs", "snapshots", "verify_snapshot"),
    }
)


class Request(NamedTuple, Generic[T]):
    """One request and how its result is read."""

    method: str
    params: dict[str, Any]
    read: Callable[[Any], T]


class StreamRequest(NamedTuple, Generic[T, F]):
    """A request whose response (read as ``F``) is followed by any number of items."""

    opening: Request[F]
    before: Callable[[F], Iterable[T]]  # items that the first response already holds
    item: Callable[[dict[str, Any]], T]


def socket_path(given: str | os.PathLike[str] | None) -> str:
    """The path to connect to: the one given, else ``$GPUSCHED_SOCKET``, else the default."""
    return (
        os.fspath(given)
        if given is not None
        else os.environ.get("GPUSCHED_SOCKET") or DEFAULT_SOCKET
    )


# -- requests ---------------------------------------------------------------------------------------


def call(method: str, params: Mapping[str, Any]) -> Request[Any]:
    """Any method; parameters that are None are left out. Raises InvalidRequest for one that starts a stream."""
    if method == "subscribe" or params.get("follow"):
        raise errors.InvalidRequest(f"{method!r} opens a stream: use events() or follow_logs()")
    return _request(method, **params)


def run(
    name: str,
    cmd: Sequence[str | os.PathLike[str]],
    gpu: int,
    gpus: Sequence[int] | None,
    directory: str | os.PathLike[str] | None,
    env: Mapping[str, str] | None,
    evictable: bool,
    isolate: bool | None,
) -> Request[types.RunResult]:
    if isinstance(cmd, str):
        raise errors.InvalidRequest(
            f"cmd is a list of arguments, such as {cmd.split()!r}, not one string"
        )
    return _request(
        "run",
        name=name,
        cmd=[os.fspath(argument) for argument in cmd],
        dir=os.path.abspath(directory or "."),  # noqa: PTH100 - pathlib would be the SDK's slowest import
        gpu=gpu if gpus is None else None,
        gpus=_list(gpus),
        env=_caller_env() if env is None else dict(env),
        evictable=evictable or None,
        isolate=isolate,
    )


def adopt(pid: int, name: str, evictable: bool, stop: bool) -> Request[types.AdoptResult]:
    stops = None if stop else False
    return _request("adopt", pid=pid, name=name, evictable=evictable or None, stop=stops)


def freeze(name: str, force: bool, keep_context: bool) -> Request[types.FreezeResult]:
    return _request("freeze", name=name, force=force or None, keep_context=keep_context or None)


def thaw(name: str, evict: bool) -> Request[types.ThawResult]:
    return _request("thaw", name=name, evict=evict or None)


def kill(name: str, force: bool) -> Request[types.KillResult]:
    return _request("kill", name=name, force=force or None)


def hibernate(name: str, force: bool) -> Request[types.FreezeResult]:
    return _request("hibernate", name=name, force=force or None)


def snapshots() -> Request[types.SnapshotsResult]:
    return _request("snapshots")


def verify_snapshot(name: str) -> Request[types.SnapshotResult]:
    return _request("verify_snapshot", name=name)


def delete_snapshot(name: str) -> Request[types.SnapshotResult]:
    return _request("delete_snapshot", name=name)


def swap(
    off: str | Sequence[str], on: str | Sequence[str], force: bool, keep_context: bool
) -> Request[tuple[Any, Any]]:
    """Each side comes back as it was given: one name as one result, several as a list."""

    def read(result: types.SwapResult) -> tuple[Any, Any]:
        return (
            result["off"][0] if isinstance(off, str) else result["off"],
            result["on"][0] if isinstance(on, str) else result["on"],
        )

    params: dict[str, Any] = {"off": _names(off), "on": _names(on)}
    params |= {"force": True} if force else {}
    params |= {"keep_context": True} if keep_context else {}
    return Request("swap", params, read)


def migrate(
    name: str, gpu: int | None, gpus: Sequence[int] | None, force: bool
) -> Request[types.MigrateResult]:
    return _request("migrate", name=name, gpu=gpu, gpus=_list(gpus), force=force or None)


def fork(
    name: str, copies: int, gpus: Sequence[int] | None, force: bool
) -> Request[types.ForkResult]:
    return _request("fork", name=name, copies=copies, gpus=_list(gpus), force=force or None)


def acquire(name: str, for_s: float | None, evict: bool) -> Request[types.AcquireResult]:
    return _request("acquire", name=name, for_s=for_s, evict=evict or None)


def release(name: str) -> Request[types.ReleaseResult]:
    return _request("release", name=name)


def status() -> Request[types.Status]:
    return _request("status")


def logs(name: str, lines: int) -> Request[types.LogsResult]:
    return _request("logs", name=name, lines=lines)


def follow_logs(name: str, lines: int) -> StreamRequest[str, types.LogsResult]:
    opening: Request[types.LogsResult] = _request("logs", name=name, lines=lines, follow=True)
    return StreamRequest(opening, lambda first: first["lines"], lambda item: str(item["line"]))


def events() -> StreamRequest[types.Event, types.Status]:
    opening: Request[types.Status] = _request("subscribe")
    return StreamRequest(opening, lambda _: (), _event)


def _request(method: str, **params: Any) -> Request[Any]:
    present = {key: value for key, value in params.items() if value is not None}
    return Request(method, present, _as_is)


def _as_is(result: Any) -> Any:
    return result


def _event(item: dict[str, Any]) -> types.Event:
    event: types.Event = item  # type: ignore[assignment]
    return event


def _list(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else list(values)


def _names(names: str | Sequence[str]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _caller_env() -> dict[str, str]:
    """The caller's environment, less what is not UTF-8: JSON cannot carry it."""
    return {key: value for key, value in os.environ.items() if _is_utf8(key + value)}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- lines ------------------------------------------------------------------------------------------


def encode(request: Request[Any], request_id: int) -> bytes:
    """The request as one line. Raises InvalidRequest for what JSON cannot say or the daemon would not read."""
    message = {"id": request_id, "method": request.method, "params": request.params}
    try:
        line = codec.encode(message)
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequest(
            f"{request.method!r} cannot be sent as JSON: {error}"
        ) from error
    if len(line) > codec.MAX_LINE_BYTES:
        raise errors.InvalidRequest(
            f"the request {request.method!r} has {len(line)} bytes; the daemon reads {codec.MAX_LINE_BYTES}: "
            "send fewer arguments or environment variables"
        )
    return line


def decode(line: bytes) -> dict[str, Any]:
    """One line of the daemon's. Raises ProtocolMismatch when it is no JSON object."""
    try:
        message = json.loads(line)
    except ValueError as error:
        raise errors.ProtocolMismatch(f"the daemon sent no JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise errors.ProtocolMismatch(f"the daemon sent no JSON object: {line[:80]!r}")
    return message


def decode_response(line: bytes, request_id: int) -> dict[str, Any]:
    """The response envelope. Raises ProtocolMismatch when it is none, or answers another request."""
    message = decode(line)
    if not isinstance(message.get("ok"), bool) or message.get("id", request_id) != request_id:
        raise errors.ProtocolMismatch(f"this does not answer request {request_id}: {line[:80]!r}")
    return message


def result_of(request: Request[T], response: Mapping[str, Any]) -> T:
    """What the method returns. Raises the error that the response describes."""
    if not response["ok"]:
        raise errors.from_wire(response)
    try:
        return request.read(response.get("result"))
    except (TypeError, LookupError) as error:
        raise errors.ProtocolMismatch(f"unexpected result of {request.method!r}") from error


def item_of(request: StreamRequest[T, Any], line: bytes) -> T:
    """One item of a stream. Raises the error when the daemon ends the stream with one."""
    message = decode(line)
    if message.get("ok") is False:
        raise errors.from_wire(message)
    try:
        return request.item(message)
    except LookupError as error:
        raise errors.ProtocolMismatch(f"unexpected item in a stream: {line[:80]!r}") from error


def may_repeat(method: str, *, sent: bool) -> bool:
    """Whether a request whose connection broke may be sent again: never one that may have been carried out twice."""
    return not sent or method in IDEMPOTENT


# -- reading a status -------------------------------------------------------------------------------


def free_mb(status: types.Status, gpu: int) -> int:
    """Free VRAM of one GPU in MiB. Raises NotFound for an index that the host does not have."""
    for found in status["gpus"]:
        if found["index"] == gpu:
            return found["mem_free_mb"]
    indices = ", ".join(str(found["index"]) for found in status["gpus"]) or "none"
    raise errors.NotFound(f"there is no GPU {gpu}; the daemon manages: {indices}")


class Readiness:
    """Whether a process holds device memory yet, from one status after another.

    A name that was never seen may still be started by somebody else; one that went away was killed.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._state: str | None = None

    def check(self, status: types.Status) -> types.ProcessStatus | None:
        """The process when it is ready, else None. Raises ProcessExited when it never will be."""
        for found in status["processes"]:
            if found["name"] == self._name:
                break
        else:
            if self._state is not None:
                raise errors.ProcessExited(f"{self._name} was killed before it was ready")
            return None
        self._state = found["state"]
        if self._state in ("dead", "failed"):
            raise errors.ProcessExited(
                f"{self._name} is {self._state} before it was ready{_exit_text(found)}; "
                f"see: gpusched logs {self._name}",
                {"process": dict(found)},
            )
        return found if found["mem_mb"] > 0 else None

    def late(self, timeout_s: float) -> TimeoutError:
        what = (
            "there is no process of that name"
            if self._state is None
            else f"it is {self._state}, without VRAM"
        )
        return TimeoutError(f"{self._name} was not ready within {timeout_s:g} s: {what}")


def _exit_text(process: types.ProcessStatus) -> str:
    if process.get("exit_signal") is not None:
        return f" (signal {process['exit_signal']})"
    if process.get("exit_code") is not None:
        return f" (exit code {process['exit_code']})"
    return f" ({process['error']})" if process.get("error") else ""


# -- errors that only a client can raise --------------------------------------------------------------


def timed_out(method: str, timeout_s: float) -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded(
        f"no answer to {method!r} within {timeout_s:g} s; the daemon may still be carrying it out"
    )


def gone(method: str, path: str) -> errors.DaemonUnavailable:
    return errors.DaemonUnavailable(
        f"the daemon at {path} closed the connection during {method!r}; whether it was carried out is not known: "
        "see gpusched status"
    )


def unreachable(path: str, error: OSError) -> errors.GpuschedError:
    """What a failed connect means to the user."""
    details = {"socket": path}
    if isinstance(error, PermissionError):
        return errors.PermissionDenied(f"you may not use the daemon's socket {path}", details)
    if isinstance(error, BlockingIOError | TimeoutError):
        return errors.DaemonUnavailable(
            f"the daemon at {path} took no connection within {CONNECT_TIMEOUT_S:g} s", details
        )
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        elsewhere = "" if path == DEFAULT_SOCKET else f", here with -s {path}"
        return errors.DaemonUnavailable(
            f"the gpusched daemon is not running (nothing listens at {path}); "
            f"start it with: sudo gpusched daemon{elsewhere}",
            details,
        )
    return errors.DaemonUnavailable(f"cannot connect to {path}: {error}", details)
