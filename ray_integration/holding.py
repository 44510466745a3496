"""What runs inside an attached actor's worker: looking at it, and keeping its calls back while its VRAM leaves.

Both are given to the actor as calls of its own (``__ray_call__``). A call that waits here has one of the actor's slots,
so calls that come later queue behind it, as behind any call. When every slot is taken so, no other call is under way.
See ``attending.py`` for the other end.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import Any, Final

from ray_integration import compat

#: Said when this slot's share of the drain is done.
DRAINED: Final = b"1"
_LOOK_S: Final = 0.01


def look(actor: object) -> dict[str, Any]:
    """Who the worker is, how many calls its actor makes at a time, and its concurrency groups."""
    members = (getattr(type(actor), name, None) for name in dir(type(actor)))
    groups = {getattr(each, "__ray_concurrency_group__", None) for each in members}
    return {
        "pid": os.getpid(),
        "class_name": type(actor).__name__,
        "groups": sorted(filter(None, groups)),
        **compat.own_actor_facts(),
    }


def hold(actor: object, path: str) -> None:
    """Keeps one slot until the agent at ``path`` lets go, or is gone, or has given up before this call's turn came."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
        sock.connect(path)
        # An actor with async methods: from here no call can begin, but those on its event loop still run.
        while compat.calls_on_event_loop():
            if select.select([sock], [], [], 0)[0]:
                return
            time.sleep(_LOOK_S)
        sock.sendall(DRAINED)
        sock.recv(1)
