"""Every error a client can see: one class for each stable code.

Covers: the error classes, their codes, families and exit codes, and building one from a wire response.
Does not cover: mapping foreign errors (each mechanism does that once, at its own edge).

All classes survive pickling (``args`` equals the constructor's arguments), because Ray ships exceptions
between processes. Every error is a ``RuntimeError``: that is what the original SDK raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Final


class Family(Enum):
    """What kind of thing went wrong; the value is the command line's exit code."""

    INTERNAL = 1
    REQUEST = 3
    CAPACITY = 4
    MECHANISM = 5
    LIFECYCLE = 6


class GpuschedError(RuntimeError):
    """Base of all errors; also what an SDK raises for a code that it does not know.

    Attributes:
        code: Stable, machine-readable name of the error.
        retryable: Whether the same request may succeed later without anything else changing.
        details: JSON-able facts: byte counts, driver result names, the process's recent history ("story").
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    family: ClassVar[Family] = Family.INTERNAL

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, dict(details or {}))

    @property
    def message(self) -> str:
        return str(self.args[0])

    @property
    def details(self) -> dict[str, Any]:
        found: dict[str, Any] = self.args[1]
        return found

    def __str__(self) -> str:
        return self.message

    def with_details(self, **more: Any) -> GpuschedError:
        """Returns the same error with further details; its cause and traceback are kept."""
        new = type(self)(self.message, {**self.details, **more})
        new.__cause__ = self.__cause__
        return new.with_traceback(self.__traceback__)


class InternalError(GpuschedError):
    """A defect in gpusched itself; the daemon's log has the traceback."""


# -- request: the caller asked for something that cannot be ---------------------------------------


class RequestError(GpuschedError):
    family = Family.REQUEST


class InvalidRequest(RequestError):
    code = "invalid_request"


class NotFound(RequestError):
    code = "not_found"


class AlreadyExists(RequestError):
    code = "already_exists"


class PermissionDenied(RequestError):
    code = "permission_denied"


class IllegalTransition(RequestError):
    code = "illegal_transition"


class LeaseHeld(RequestError):
    code = "lease_held"
    retryable = True


# -- capacity: there is not enough of something ---------------------------------------------------


class CapacityError(GpuschedError):
    family = Family.CAPACITY
    retryable = True


class InsufficientGpuMemory(CapacityError):
    code = "insufficient_gpu_memory"


class InsufficientHostMemory(CapacityError):
    code = "insufficient_host_memory"


class InsufficientDisk(CapacityError):
    code = "insufficient_disk"


# -- mechanism: the driver, the kernel or CRIU refused --------------------------------------------


class MechanismError(GpuschedError):
    family = Family.MECHANISM


class LockTimeout(MechanismError):
    code = "lock_timeout"
    retryable = True


class DriverError(MechanismError):
    code = "driver_error"


class CriuError(MechanismError):
    code = "criu_error"


class Unsupported(MechanismError):
    code = "unsupported"


# -- lifecycle: a process, an operation or the daemon ended ---------------------------------------


class LifecycleError(GpuschedError):
    family = Family.LIFECYCLE


class ProcessExited(LifecycleError):
    code = "process_exited"


class ProcessLost(LifecycleError):
    code = "process_lost"


class Cancelled(LifecycleError):
    code = "cancelled"
    retryable = True


class DeadlineExceeded(LifecycleError):
    code = "deadline_exceeded"
    retryable = True


class ShuttingDown(LifecycleError):
    code = "shutting_down"
    retryable = True


class ProtocolMismatch(LifecycleError):
    code = "protocol_mismatch"


class Unavailable(LifecycleError):
    code = "unavailable"
    retryable = True


class DaemonUnavailable(Unavailable, ConnectionError):
    """No daemon answers at the socket. Raised by the SDK alone, never sent over the wire."""

    def __str__(self) -> str:  # ConnectionError would print "[Errno ...]" for two arguments
        return self.message


#: Wire code -> class. Codes are frozen: clients branch on them.
BY_CODE: Final[Mapping[str, type[GpuschedError]]] = {
    cls.code: cls
    for cls in (
        InternalError,
        InvalidRequest,
        NotFound,
        AlreadyExists,
        PermissionDenied,
        IllegalTransition,
        LeaseHeld,
        InsufficientGpuMemory,
        InsufficientHostMemory,
        InsufficientDisk,
        LockTimeout,
        DriverError,
        CriuError,
        Unsupported,
        ProcessExited,
        ProcessLost,
        Cancelled,
        DeadlineExceeded,
        ShuttingDown,
        ProtocolMismatch,
        Unavailable,
    )
}


def from_wire(response: Mapping[str, Any]) -> GpuschedError:
    """Builds the error that an ``{"ok": false, ...}`` response describes; an unknown code gives the base."""
    cls = BY_CODE.get(str(response.get("code", "")), GpuschedError)
    details = response.get("details")
    return cls(
        str(response.get("error", "unknown error")), details if isinstance(details, dict) else None
    )


def to_wire(error: GpuschedError) -> dict[str, Any]:
    """The error part of a response line: a text for a person, and code, retryable, details for machines."""
    return {
        "ok": False,
        "error": error.message,
        "code": error.code,
        "retryable": error.retryable,
        "details": error.details,
    }
