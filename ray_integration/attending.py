"""Attached actors: workers of plain Ray actors that the daemon freezes as they are, without stopping them.

The agent of a node stands in for the proxy that such an actor does not have: it answers at the model's socket, as
``answering.py`` describes, so that moving an attached model is the same as moving a hosted one. Before a freeze it
takes all of the actor's slots (``holding.py``): calls under way have ended then, and later ones queue. Once the VRAM is
gone the slots are free again; a call that needs CUDA waits in the driver until the thaw. Ray notices nothing of it.

Does not cover: actors that were made with ``freezable``.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from gpusched import errors
from gpusched.client import GpuSched
from ray_integration import answering, compat, holding, hosting, keeper, places, tending
from ray_integration.errors import DrainTimeout
from ray_integration.frames import ConnectionLost, check_peer
from ray_integration.places import About

log = logging.getLogger(__name__)

#: The file with what a new agent needs: how many slots (4 bytes), and what it makes its handle of.
HANDLE: Final = "handle"
_LOOK_S: Final = 0.05


class Slots:
    """All slots of an actor, taken. Until ``free`` its calls wait."""

    def __init__(self, handle: Any, count: int, path: Path, timeout_s: float) -> None:
        """Blocks until no call is under way. Raises DrainTimeout, or ProcessExited when the actor dies; nothing is
        held then.
        """
        self._taken: list[socket.socket] = []
        listener = answering.listen(path)
        listener.settimeout(_LOOK_S)
        try:
            calls = [handle.__ray_call__.remote(holding.hold, str(path)) for _ in range(count)]
            self._take(listener, calls, count, timeout_s)
        except BaseException:
            self.free()
            raise
        finally:
            listener.close()
            path.unlink(missing_ok=True)  # a call whose turn comes later finds nobody, and ends

    def _take(
        self, listener: socket.socket, calls: list[Any], count: int, timeout_s: float
    ) -> None:
        deadline = time.monotonic() + timeout_s
        drained: set[socket.socket] = set()
        while len(drained) < count:
            with contextlib.suppress(TimeoutError, ConnectionLost):
                sock, _ = listener.accept()
                check_peer(sock)
                self._taken.append(sock)
            waiting = [each for each in self._taken if each not in drained]
            for sock in select.select(waiting, [], [], 0)[0]:
                if sock.recv(1) == holding.DRAINED:
                    drained.add(sock)
            _require_alive(calls)
            if len(drained) < count and time.monotonic() > deadline:
                raise DrainTimeout(
                    f"a call is still under way after {timeout_s:g} s; wait for it, give more time (timeout_s=), or "
                    "freeze in its middle (drain=False)",
                    {"timeout_s": timeout_s, "slots": count, "drained": len(drained)},
                )

    def free(self) -> None:
        for sock in self._taken:
            sock.close()
        self._taken = []


def _require_alive(calls: list[Any]) -> None:
    """Raises when one of the calls that hold slots has ended: nobody told it to."""
    ended, _ = ray.wait(calls, num_returns=1, timeout=0)
    for call in ended:
        try:
            ray.get(call)
        except RayTaskError as error:
            raise errors.Unsupported(f"the actor cannot be held: {error}") from error
        except RayError as error:
            raise errors.ProcessExited(f"the actor has died: {error}") from error
        raise errors.ProcessExited("the actor let a call of ours end")


class Attended:
    """One attached actor."""

    def __init__(self, about: About, handle: Any, slots: int, lock_fd: int) -> None:
        self.about = about
        self._handle = handle
        self._slots = slots
        self._lock_fd = lock_fd
        self._moves = 0
        self._numbers = threading.Lock()
        path = about.directory / answering.SOCKET
        self._listener = answering.serve(path, lambda: _AttendedConversation(self))

    def hold(self, timeout_s: float) -> Slots:
        with self._numbers:
            self._moves += 1
            path = self.about.directory / f"hold-{self._moves}"
        return Slots(self._handle, self._slots, path, timeout_s)

    def end(self) -> None:
        """Stops answering, and is not the model's proxy any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        places.unlock(self._lock_fd)


class _AttendedConversation:
    def __init__(self, attended: Attended) -> None:
        self._attended = attended
        self._slots: Slots | None = None

    def prepare(self, request: dict[str, Any]) -> None:
        if request["drain"] and self._slots is None:
            self._slots = self._attended.hold(request["timeout_s"])

    def quiesce(self) -> None:
        """It has no hooks."""

    def settled(self, *, on_gpu: bool) -> None:
        self.end()

    def status(self) -> dict[str, Any]:
        """Who calls is not known, so it never counts as idle: nobody's thaw evicts it by itself."""
        gate = "attached" if self._slots is None else "moving"
        return {"gate": gate, "under_way": None, "waiting": None, "idle_s": 0.0, "proxy_pid": None}

    def end(self) -> None:
        if self._slots is not None:
            self._slots.free()
            self._slots = None


class Attending:
    """All attached actors of one node. Threads may share it."""

    def __init__(self, client: GpuSched, node_id: str) -> None:
        self._client = client
        self._node_id = node_id
        self._attended: dict[str, Attended] = {}
        self._lock = threading.Lock()

    def attach(self, handle: Any, *, evictable: bool, timeout_s: float) -> dict[str, Any]:
        """Hands the worker of a plain actor to the daemon. Again: a success without action.

        Raises InvalidRequest for a freezable actor, Unsupported for one that cannot be drained, what ``adopt`` raises.
        """
        actor_id = compat.actor_id(handle)
        known = About.read(actor_id)
        if known is not None and not known.attached:
            raise errors.InvalidRequest(
                f"actor {actor_id} was made with freezable: it needs no attach"
            )
        weak, state = compat.weak_handle(handle)
        del handle  # it would keep the actor alive for as long as this agent lives
        facts = _look(weak, timeout_s)
        if facts["groups"]:
            raise errors.Unsupported(
                f"{facts['class_name']} has concurrency groups ({', '.join(facts['groups'])}), whose calls cannot be "
                "awaited before a freeze; make the class freezable, or use max_concurrency"
            )
        with self._lock:
            if actor_id not in self._attended:
                self._begin(actor_id, weak, state, facts, evictable)
        about = self._attended[actor_id].about
        return {**(hosting.find(self._client, about.name) or {}), "node_id": self._node_id}

    def _begin(
        self, actor_id: str, weak: Any, state: bytes, facts: dict[str, Any], evictable: bool
    ) -> None:
        about = About(
            actor_id=actor_id,
            node_id=self._node_id,
            name=places.process_name(facts["name"] or facts["class_name"], actor_id),
            socket=self._client.socket_path,
            gpus=hosting.choose_gpus(facts["gpus"], None, self._client.status()["gpus"]),
            class_name=facts["class_name"],
            attached=True,
        )
        about.directory.mkdir(mode=0o700, exist_ok=True)
        lock_fd = places.lock(about.directory / "lock")
        if lock_fd is None:
            raise errors.Unavailable(f"another agent attends to {about.name}; try again")
        try:
            self._adopt(about, facts["pid"], evictable=evictable)
            (about.directory / HANDLE).write_bytes(facts["slots"].to_bytes(4) + state)
            about.write()
        except BaseException:
            places.unlock(lock_fd)
            about.remove()
            raise
        self._attended[actor_id] = Attended(about, weak, facts["slots"], lock_fd)
        tending.ensure_keeper(self._client, self._node_id)

    def _adopt(self, about: About, pid: int, *, evictable: bool) -> None:
        """An agent that died after it had adopted the worker has done it already."""
        found = hosting.find(self._client, about.name)
        if found is None or found["pid"] != pid or found["state"] in ("dead", "failed"):
            self._client.adopt(pid, about.name, evictable=evictable, stop=False)

    def tend(self, about: About) -> None:
        """Looks after one attached model of this node: takes it up after another agent, follows it to a new worker, and
        forgets it when its actor is dead or elsewhere. To be called again and again.
        """
        facts = compat.actor_facts(about.actor_id)
        state = facts["state"] if facts is not None else "DEAD"
        if (
            facts is None
            or state == "DEAD"
            or (state == "ALIVE" and facts["node_id"] != self._node_id)
        ):
            with self._lock:
                attended = self._attended.pop(about.actor_id, None)
            if attended is not None:
                attended.end()
            log.warning("%s", keeper.end_host(about))
        elif state == "ALIVE":
            self._follow(about, facts["pid"])

    def take_up(self, about: About) -> None:
        """Goes on where an agent that died has left; does nothing where that was done. Asks nobody."""
        with self._lock:
            if about.actor_id in self._attended:
                return
            lock_fd = places.lock(about.directory / "lock")
            if lock_fd is None:
                raise errors.Unavailable(f"another agent attends to {about.name}; try again")
            left = (about.directory / HANDLE).read_bytes()
            weak = compat.weak_handle_of(left[4:])
            self._attended[about.actor_id] = Attended(
                about, weak, int.from_bytes(left[:4]), lock_fd
            )

    def _follow(self, about: About, pid: int) -> None:
        self.take_up(about)
        with self._lock:
            found = hosting.find(self._client, about.name)
            if found is None or found["state"] == "dead":
                evictable = bool(found and found["evictable"])
                self._client.adopt(pid, about.name, evictable=evictable, stop=False)


def _look(weak: Any, timeout_s: float) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = ray.get(weak.__ray_call__.remote(holding.look), timeout=timeout_s)
    except GetTimeoutError as error:
        raise errors.DeadlineExceeded(
            f"the actor did not answer within {timeout_s:g} s: a call of it goes on"
        ) from error
    except RayTaskError as error:
        raise errors.Unsupported(
            f"the actor's worker cannot be looked at; is gpusched installed for it? {error}"
        ) from error
    except RayError as error:
        raise errors.NotFound(f"the actor has died: {error}") from error
    return facts
