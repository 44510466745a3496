"""The gate of one model: whether calls may go to the host now, who waits, and who is under way.

    open     calls pass
    moving   somebody is freezing the model, or about to: new calls wait, those under way go on
    frozen   new calls wait, ask for a thaw, or fail, as the model's policy says

Pure bookkeeping under one lock: whoever waits does so on a future. Calls that wait pass in the order in which they
came. Does not cover: what the policy does (``proxy.py``), where the state is learnt (``watching.py``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from enum import StrEnum
from typing import Final

from ray_integration.errors import DrainTimeout


class State(StrEnum):
    OPEN = "open"
    MOVING = "moving"
    FROZEN = "frozen"


#: Seconds between two looks of those who wait on the gate from a thread.
POLL_S: Final = 0.05


class Gate:
    """Threads may share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state = State.MOVING  # until the host is there
        self._under_way = 0
        self._waiting: deque[Future[None]] = deque()
        self._idle_since_s = time.monotonic()

    def __repr__(self) -> str:
        return f"<Gate {self._state} [{self._under_way} under way, {len(self._waiting)} waiting]>"

    @property
    def state(self) -> State:
        return self._state

    @property
    def under_way(self) -> int:
        return self._under_way

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle_s(self) -> float:
        """Seconds since the last call ended; 0 while one is under way or waits."""
        with self._changed:
            if self._under_way or self._waiting:
                return 0.0
            return time.monotonic() - self._idle_since_s

    def enter(self) -> Future[None] | None:
        """Begins a call: None when it may go on, else what to wait for. ``leave`` or ``give_up`` must follow."""
        with self._changed:
            if self._state is State.OPEN:
                self._under_way += 1
                return None
            ticket: Future[None] = Future()
            self._waiting.append(ticket)
            return ticket

    def give_up(self, ticket: Future[None]) -> None:
        """The call with this ticket will not happen, whether or not it was let in meanwhile."""
        with self._changed:
            try:
                self._waiting.remove(ticket)
            except ValueError:
                if ticket.done():
                    self._ended()

    def leave(self) -> None:
        """A call that was let in has ended."""
        with self._changed:
            self._ended()

    def _ended(self) -> None:
        self._under_way -= 1
        self._idle_since_s = time.monotonic()
        self._changed.notify_all()

    def open(self) -> None:
        """Lets in everybody who waits, in their order."""
        with self._changed:
            self._state = State.OPEN
            while self._waiting:
                ticket = self._waiting.popleft()
                self._under_way += 1
                ticket.set_result(None)

    def close(self, state: State) -> None:
        """From here on calls wait. Those under way go on."""
        with self._changed:
            self._state = state

    def drain(self, timeout_s: float) -> None:
        """Blocks until no call is under way. Raises DrainTimeout after ``timeout_s`` seconds; nothing is changed."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._under_way, timeout_s):
                raise DrainTimeout(
                    f"{self._under_way} call(s) still under way after {timeout_s:g} s; wait for them, give more "
                    "time (timeout_s=), or freeze in their middle (drain=False)",
                    {"under_way": self._under_way, "timeout_s": timeout_s},
                )
