"""How a proxy learns what the daemon did with its host: from the daemon's events, on a thread of its own.

So whoever freezes a model (the driver, the command line, an eviction), its calls wait from then on, and none of them
asks the daemon. Without a daemon the last that was known holds; the thread goes on trying.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final

from gpusched import errors, types
from gpusched.client import GpuSched
from ray_integration.errors import HookFailed
from ray_integration.hosting import find

if TYPE_CHECKING:
    from ray_integration.proxy import Proxy

_RETRY_S: Final = 0.3
#: Events that leave a process where it was.
_NO_MOVE: Final = frozenset({"run", "acquire", "release", "fork"})


def watch(proxy: Proxy) -> None:
    """Learns the state now, and then whatever becomes of it. Raises DaemonUnavailable."""
    client = GpuSched(proxy.about.socket)
    look(proxy, client)
    threading.Thread(
        target=_follow, args=(proxy, client), name="gpusched-events", daemon=True
    ).start()


def look(proxy: Proxy, client: GpuSched) -> None:
    """Asks the daemon how the host is, and acts on it. Raises what the client raises."""
    _apply(proxy, find(client, proxy.about.name))


def _follow(proxy: Proxy, client: GpuSched) -> None:
    pause = threading.Event()
    while True:
        try:
            with client.events() as events:
                look(proxy, client)  # what happened before they began
                for event in events:
                    if event.get("process") == proxy.about.name and event["type"] not in _NO_MOVE:
                        look(proxy, client)
        except errors.GpuschedError:
            pass  # no daemon, or none that answers: another will come
        pause.wait(_RETRY_S)


def _apply(proxy: Proxy, found: types.ProcessStatus | None) -> None:
    if found is None:
        return  # a daemon that knows nothing of it: the connection to the host will tell
    match found["state"]:
        case "active":
            try:
                proxy.learn(on_gpu=True)
            except HookFailed as error:  # nobody waits for it; calls go on
                print(f"gpusched: {proxy.about.name}: {error}", file=sys.stderr)  # noqa: T201
        case "frozen" | "hibernated":
            proxy.learn(on_gpu=False)
        case "dead":
            proxy.host_lost(f"its host has ended ({_how(found)})")
        case "failed":
            proxy.host_lost(f"its host lost its GPU memory ({found['error']})")
        case _:
            pass  # on its way; another event tells where to


def _how(found: types.ProcessStatus) -> str:
    if found["exit_signal"] is not None:
        return f"signal {found['exit_signal']}"
    return f"exit code {found['exit_code']}"
