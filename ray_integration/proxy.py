"""The Ray side of a hosted model: lets calls through to the host while it is on a GPU, and knows when it is not.

One ``Proxy`` lives in each actor that ``freezable`` made. A call costs one look at the gate and one exchange with the
host, never a request to the daemon: what the daemon does is learnt from its events (``watching.py``) and from the
node's agent (``answering.py``). Nothing here holds GPU memory, and nothing is lost with it but the calls under way.

If the host ends, so does this process, at once: Ray then does what it does for any actor whose process ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn

import ray
from ray.exceptions import TaskCancelledError

from gpusched import errors
from gpusched.client import GpuSched
from ray_integration import (
    agent,
    answering,
    compat,
    copies,
    exchange,
    hosting,
    places,
    tending,
    watching,
)
from ray_integration.errors import HostLost, ModelFrozen
from ray_integration.frames import Kind
from ray_integration.gate import POLL_S, Gate, State
from ray_integration.hooks import Hooks
from ray_integration.links import Links
from ray_integration.places import About

OnFrozen = Literal["queue", "thaw", "raise"]

_LOCK_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``freezable`` was told. ``gpus``: the daemon's numbers, in place of what Ray assigns.

    ``host``: the process to take over, a copy of another model's host; such an actor makes none (``replicas.py``).
    """

    on_frozen: OnFrozen = "queue"
    gpus: tuple[int, ...] | None = None
    evictable: bool = False
    isolate: bool | None = None
    start_frozen: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    #: Which of ``hooks.NAMES`` the class has, and on which lane they run.
    hooks: tuple[str, ...] = ()
    hook_lane: str = "main"
    host: str = ""


class Proxy:
    """Threads may share it."""

    def __init__(self, settings: Settings, class_name: str) -> None:
        """Takes its place: directory, lock, name. The host is found or made by ``begin``."""
        context = ray.get_runtime_context()
        self._settings = settings
        self._client = GpuSched()
        actor_id = str(context.get_actor_id())
        directory = places.base() / actor_id
        directory.mkdir(mode=0o700, exist_ok=True)
        self._lock_fd = hosting.wait_for_lock(directory, _LOCK_TIMEOUT_S)
        ray_gpus = [str(each) for each in context.get_accelerator_ids().get("GPU", [])]
        self.about = About(
            actor_id=actor_id,
            node_id=str(context.get_node_id()),
            name=settings.host
            or places.process_name(context.get_actor_name() or class_name, actor_id),
            socket=self._client.socket_path,
            gpus=hosting.choose_gpus(ray_gpus, settings.gpus, self._client.status()["gpus"]),
            class_name=class_name,
        )
        self.gate = Gate()
        self.links = Links(hosting.socket_finder(self._client, self.about))
        self._state_lock = threading.Lock()
        self._holds = 0
        self._is_on_gpu = False
        self._thaw: Future[None] | None = None
        self._thaw_lock = threading.Lock()
        self.hooks = Hooks(self.links, directory, settings.hooks, settings.hook_lane)

    def __repr__(self) -> str:
        return f"<Proxy of {self.about.name} {self.gate!r}>"

    # -- the beginning --------------------------------------------------------------------------

    def begin(self, pickled_class: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Goes on with the host that this actor has, or starts one and makes the model in it.

        Raises what the constructor raises; then no host is left.
        """
        found = hosting.find(self._client, self.about.name)
        if self._settings.host:
            copies.claim(found, self.about)
        elif hosting.is_usable(found, self.about):
            self.about.write()  # the node may have a new id, and the daemon a new socket
        else:
            self._make(pickled_class, args, kwargs)
        answering.serve(
            self.about.directory / answering.SOCKET, lambda: answering.ProxyConversation(self)
        )
        watching.watch(self)
        tending.ensure_keeper(self._client, self.about.node_id)
        agent.handle(self.about.node_id)

    def _make(self, pickled_class: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = {"evictable": self._settings.evictable, "isolate": self._settings.isolate}
        hosting.start(self._client, self.about, self._settings.env, options)
        try:
            # A lease: nobody may freeze what cannot answer yet.
            with self._client.on_gpu(self.about.name):
                hosting.await_listening(
                    self._client, self.about, self.links, hosting.START_TIMEOUT_S
                )
                value = (pickled_class, args, kwargs)
                self.links.call(Kind.INIT, value, on_main=True, is_cancelled=lambda: False)
            self.links.release_main()
            if self._settings.start_frozen:
                self._client.freeze(self.about.name)
            (self.about.directory / hosting.READY).touch(mode=0o600)
        except BaseException as error:
            words = hosting.last_words(self._client, self.about.name)
            with contextlib.suppress(errors.GpuschedError):
                self._client.kill(self.about.name, force=True)
            self.about.remove()
            if isinstance(error, HostLost):
                raise HostLost(
                    f"the host ended in the constructor; its log ends:\n{words}"
                ) from error
            raise

    # -- what is known of the host --------------------------------------------------------------

    def learn(self, *, on_gpu: bool) -> None:
        """The model is, or is not, on its GPU now."""
        with self._state_lock:
            self._is_on_gpu = on_gpu
            is_held = self._holds > 0
        try:
            if on_gpu and not is_held:
                self.hooks.after_thaw()
        finally:
            with self._state_lock:
                self._settle()

    def hold(self) -> None:
        """Calls wait from here on, until as many ``unhold`` follow."""
        with self._state_lock:
            self._holds += 1
            self._settle()

    def unhold(self, *, on_gpu: bool | None) -> None:
        """``on_gpu``: what is known by now; None where the daemon must be asked. Raises HookFailed; calls go on."""
        if on_gpu is None:
            with contextlib.suppress(errors.GpuschedError):  # the daemon's events will tell
                watching.look(self, self._client)
        else:
            self._is_on_gpu = on_gpu
        try:
            if self._is_on_gpu and self._holds == 1:
                self.hooks.after_thaw()
        finally:
            with self._state_lock:
                self._holds -= 1
                self._settle()

    def _settle(self) -> None:
        if self._holds:
            self.gate.close(State.MOVING)
        elif self._is_on_gpu:
            self.gate.open()
        else:
            self.gate.close(State.FROZEN)

    def host_lost(self, why: str) -> NoReturn:
        """Ends this process, so that Ray restarts the actor or tells its callers."""
        print(f"gpusched: {self.about.name}: {why}; its actor ends with it", file=sys.stderr)  # noqa: T201
        sys.stderr.flush()
        os._exit(1)

    # -- calls ----------------------------------------------------------------------------------

    def call(self, method: str, args: Any, kwargs: Any, *, on_main: bool) -> Any:
        """A call from a thread. Raises what the method raises, ModelFrozen, TaskCancelledError."""
        self._enter()
        try:
            value = (method, args, kwargs, False)
            return self.links.call(
                Kind.CALL, value, on_main=on_main, is_cancelled=compat.is_cancelled
            )
        except HostLost as error:
            self.host_lost(str(error))
        finally:
            self.gate.leave()

    def stream(self, method: str, args: Any, kwargs: Any, *, on_main: bool) -> Iterator[Any]:
        self._enter()
        try:
            value = (method, args, kwargs, True)
            yield from self.links.stream(value, on_main=on_main, is_cancelled=compat.is_cancelled)
        except HostLost as error:
            self.host_lost(str(error))
        finally:
            self.gate.leave()

    async def call_async(self, method: str, args: Any, kwargs: Any) -> Any:
        await self._enter_async()
        try:
            return await self.links.call_async((method, args, kwargs, False))
        except HostLost as error:
            self.host_lost(str(error))
        finally:
            self.gate.leave()

    async def stream_async(self, method: str, args: Any, kwargs: Any) -> AsyncIterator[Any]:
        await self._enter_async()
        try:
            async for item in self.links.stream_async((method, args, kwargs, True)):
                yield item
        except HostLost as error:
            self.host_lost(str(error))
        finally:
            self.gate.leave()

    # -- waiting for the gate -------------------------------------------------------------------

    def _enter(self) -> None:
        ticket = self.gate.enter()
        if ticket is None:
            return
        thaw: Future[None] | None = None
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    ticket.result(POLL_S)
                    return
                if compat.is_cancelled():
                    raise TaskCancelledError(error_message="cancelled while the model was frozen")
                thaw = self._apply_policy(thaw)
        except BaseException:
            self.gate.give_up(ticket)
            raise

    async def _enter_async(self) -> None:
        ticket = self.gate.enter()
        if ticket is None:
            return
        thaw: Future[None] | None = None
        try:
            waiter = asyncio.wrap_future(ticket)
            while not (await asyncio.wait({waiter}, timeout=POLL_S))[0]:
                thaw = self._apply_policy(thaw)
        except BaseException:
            self.gate.give_up(ticket)
            raise

    def _apply_policy(self, thaw: Future[None] | None) -> Future[None] | None:
        """What this actor does about a call on a frozen model, beside waiting. Raises to refuse the call.

        ``thaw``: the attempt that this call has waited for so far, which is returned for the next time.
        """
        if self.gate.state is not State.FROZEN:
            return thaw
        if self._settings.on_frozen == "raise":
            raise ModelFrozen(
                f"{self.about.name} is frozen, and its policy is to refuse calls then; thaw it, or make it with "
                "on_frozen='queue' or 'thaw'",
                {"name": self.about.name},
            )
        if self._settings.on_frozen != "thaw":
            return thaw
        if thaw is not None and thaw.done() and (error := thaw.exception()) is not None:
            raise error
        return self._thaw_once()

    def _thaw_once(self) -> Future[None]:
        """The attempt under way, or a new one on a thread of its own."""
        with self._thaw_lock:
            if self._thaw is None or self._thaw.done():
                self._thaw = Future()
                threading.Thread(
                    target=self._perform_thaw, args=(self._thaw,), name="gpusched-thaw", daemon=True
                ).start()
            return self._thaw

    def _perform_thaw(self, done: Future[None]) -> None:
        try:
            exchange.bring_on(self._client, [self.about])
        except BaseException as error:  # noqa: BLE001 - told to those who wait
            done.set_exception(error)
        else:
            self.learn(on_gpu=True)
            done.set_result(None)
