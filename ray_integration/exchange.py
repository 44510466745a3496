"""Moving the models of one node on and off its GPUs: their proxies told first, then ONE operation of the daemon.

Runs in the node's agent, and in a proxy whose policy is to thaw by itself. Standard library and the SDK only.

    prepare   the proxies of what goes off hold their calls back and let those under way end (drain)
    quiesce   once all have: they drop their connections, and the models' hooks run, which may wait for one another
    move      the daemon freezes and thaws, all or nothing; a daemon that dies meanwhile is waited for and asked again
    settle    every proxy is told where its model is now; after an error that is what the daemon says

An error leaves every model where it was before, as far as the daemon lives to say so; calls that waited go on.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from gpusched import errors
from gpusched.client import GpuSched
from ray_integration import answering, hooks, places
from ray_integration.errors import DrainTimeout, HookFailed
from ray_integration.places import About

T = TypeVar("T")

#: Seconds for calls under way to end, where nobody says otherwise.
DRAIN_TIMEOUT_S: Final = 60.0
#: Seconds that a daemon may be away in the middle of an operation.
DAEMON_TIMEOUT_S: Final = 30.0
_RETRY_S: Final = 0.2
_CONNECT_TIMEOUT_S: Final = 5.0
_ANSWER_MARGIN_S: Final = 10.0
_HOOKS_TIMEOUT_S: Final = hooks.TIMEOUT_S + _ANSWER_MARGIN_S


class ProxyLine:
    """One conversation with a proxy; see ``answering.py``. A proxy that is gone is None from ``open``."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = sock.makefile("rb")

    @classmethod
    def open(cls, about: About) -> ProxyLine | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(_CONNECT_TIMEOUT_S)
        try:
            sock.connect(str(about.directory / answering.SOCKET))
        except OSError:
            sock.close()
            return None
        return cls(sock)

    def send(self, **request: Any) -> None:
        with contextlib.suppress(OSError):  # gone: its answer says so
            self._sock.sendall(json.dumps(request).encode() + b"\n")

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The answer, or None from a proxy that is gone. Raises what the proxy refused with, DeadlineExceeded."""
        self._sock.settimeout(timeout_s)
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"the model's proxy did not answer within {timeout_s:g} s"
            ) from None
        except OSError:
            return None
        if not line:
            return None
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            error = errors.from_wire(answer)
            if isinstance(error, errors.DeadlineExceeded):
                raise DrainTimeout(*error.args)
            if "hook" in error.details:
                raise HookFailed(*error.args)
            raise error
        return answer

    def close(self) -> None:
        """Ends the conversation, and with it what it held back."""
        self._lines.close()
        self._sock.close()


def proxy_status(about: About, timeout_s: float = 2.0) -> dict[str, Any] | None:
    """Who calls the model and who waits; None where the proxy does not answer."""
    line = ProxyLine.open(about)
    if line is None:
        return None
    try:
        line.send(do="status")
        return line.answer(timeout_s)
    except errors.GpuschedError:
        return None
    finally:
        line.close()


class Held:
    """Conversations with the proxies of models that are being moved; their calls wait until it is closed."""

    def __init__(self) -> None:
        self._lines: list[tuple[ProxyLine, bool]] = []

    def hold(self, models: Sequence[About], *, on_gpu: bool, **how: Any) -> None:
        """Asks the proxies to prepare; ``on_gpu``: where the models will be. Does not wait."""
        for about in models:
            if (line := ProxyLine.open(about)) is not None:
                self._lines.append((line, on_gpu))
                line.send(do="prepare", **how)

    def await_prepared(self, timeout_s: float) -> None:
        """Raises DrainTimeout: then the move must not be."""
        for line, _ in self._lines:
            line.answer(timeout_s + _ANSWER_MARGIN_S)

    def quiesce(self) -> None:
        """What goes off has drained, all of it. Raises HookFailed: then the move must not be."""
        going = [line for line, on_gpu in self._lines if not on_gpu]
        for line in going:
            line.send(do="quiesce")
        for line in going:
            line.answer(_HOOKS_TIMEOUT_S)

    def settle(self) -> None:
        """The move is done: tells all where their models are. Raises HookFailed once all have answered; calls go on."""
        failed: HookFailed | None = None
        for line, on_gpu in self._lines:
            line.send(do="settled", on_gpu=on_gpu)
        for line, _ in self._lines:
            try:
                line.answer(_HOOKS_TIMEOUT_S)
            except HookFailed as error:
                failed = failed or error
            except errors.GpuschedError:
                continue  # the daemon's events will tell it
        if failed is not None:
            raise failed

    def close(self) -> None:
        for line, _ in self._lines:
            line.close()


@contextlib.contextmanager
def prepared(
    off: Sequence[About], on: Sequence[About] = (), *, drain: bool, timeout_s: float
) -> Iterator[Held]:
    """Within the block the models' calls wait, and (``drain``) none of ``off`` is under way.

    Raises DrainTimeout when one is still under way after ``timeout_s`` seconds; then all go on, and no hook has run.
    Proxies that have died need no preparation: their calls are lost or will be made again by Ray.
    """
    held = Held()
    try:
        held.hold(off, on_gpu=False, drain=drain, timeout_s=timeout_s)
        held.hold(on, on_gpu=True, drain=False, timeout_s=timeout_s)
        held.await_prepared(timeout_s)
        if drain:
            held.quiesce()
        yield held
    finally:
        held.close()


def insist(ask: Callable[[], T], timeout_s: float = DAEMON_TIMEOUT_S) -> T:
    """Asks the daemon what may be asked twice, again while it is away. Raises DaemonUnavailable at the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except (errors.DaemonUnavailable, errors.ShuttingDown):
            if time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)


def move(
    client: GpuSched,
    off: Sequence[About],
    on: Sequence[About],
    *,
    drain: bool = True,
    timeout_s: float = DRAIN_TIMEOUT_S,
    force: bool = False,
    keep_context: bool = False,
) -> dict[str, Any]:
    """Freezes ``off`` and thaws ``on`` as one operation. Blocks until both are done, or neither.

    Returns {"off": [a result for each], "on": [...], "duration_ms"}.
    """
    with prepared(off, on, drain=drain, timeout_s=timeout_s) as held:
        names = [about.name for about in off], [about.name for about in on]
        answer: dict[str, Any] = insist(
            lambda: client.call(
                "swap",
                off=names[0],
                on=names[1],
                force=force or None,
                keep_context=keep_context or None,
            )
        )
        held.settle()
    return answer


# -- room by evicting -------------------------------------------------------------------------------


def bring_on(client: GpuSched, models: Sequence[About], *, evict: bool = True) -> None:
    """Thaws models as one; while there is no room, idle ones on their GPUs go off for them, the longest idle first.

    Only models of this node whose proxies say that no call is under way or waits. Raises InsufficientGpuMemory when
    that does not suffice; nobody has moved then.
    """
    victims: list[About] = []
    candidates: list[About] | None = None if evict else []
    while True:
        try:
            move(client, victims, models, timeout_s=0.0)
        except errors.InsufficientGpuMemory:
            if candidates is None:
                candidates = _idle_neighbours(client, models)
            if not candidates:
                raise
            victims.append(candidates.pop(0))
        except DrainTimeout:  # not idle any more
            victims.pop()
        else:
            return


def _idle_neighbours(client: GpuSched, models: Sequence[About]) -> list[About]:
    """Other models on their GPUs that nobody uses or leases, the longest idle first."""
    listed = client.processes()
    own = {about.actor_id for about in models}
    names = {about.name for about in models}
    # Not those that a model was made on: somebody may have migrated it since.
    gpus = {gpu for found in listed if found["name"] in names for gpu in found["gpus"]}
    active = {
        found["name"]
        for found in listed
        if found["state"] == "active" and set(found["gpus"]) & gpus and not found["leases"]
    }
    idle: list[tuple[float, About]] = []
    for other in places.models(models[0].node_id):
        if other.actor_id in own or other.name not in active:
            continue
        found = proxy_status(other)
        if found is not None and found["idle_s"] > 0:
            idle.append((found["idle_s"], other))
    return [other for _, other in sorted(idle, key=lambda each: -each[0])]
