"""What a model does around its own freeze: ``before_freeze`` and ``after_thaw``, methods of the user's class.

For state that cannot be frozen or need not be: destroy NCCL communicators and make them anew, drop a KV cache. They run
in the host, on its main thread (beside the event loop for a class with async methods), while no call is under way and
new ones wait. The ranks of one group run them at the same time, so they may wait for one another, as collectives do.

``after_thaw`` follows every ``before_freeze`` that returned, also when the freeze then failed. A freeze that does not
go through the integration (the command line, ``drain=False``) calls neither.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from ray_integration.errors import HookFailed, HostLost
from ray_integration.links import Links

NAMES: Final = ("before_freeze", "after_thaw")
#: Seconds that the hooks of a model may take; a freeze or thaw waits for them.
TIMEOUT_S: Final = 120.0
#: Left in the model's directory between the two, for a proxy that is restarted meanwhile.
MARK: Final = "prepared"


class Hooks:
    """Those of one model. Threads may share it; the hooks run one after the other."""

    def __init__(self, links: Links, directory: Path, names: tuple[str, ...], lane: str) -> None:
        self._links = links
        self._mark = directory / MARK
        self._names = names
        self._lane = lane
        self._lock = threading.Lock()

    def before_freeze(self) -> None:
        """Blocks until the model is ready to be frozen. Raises HookFailed: then it must not be."""
        if not self._names:
            return
        with self._lock:
            if not self._mark.exists():
                self._run("before_freeze")
                self._mark.touch(mode=0o600)

    def after_thaw(self) -> None:
        """Blocks until the model can be called again. Raises HookFailed; it is not tried again."""
        if not self._names:
            return
        with self._lock:
            if self._mark.exists():
                self._mark.unlink()
                self._run("after_thaw")

    def _run(self, name: str) -> None:
        if name not in self._names:
            return
        try:
            self._links.call_apart(name, self._lane)
        except HostLost:
            raise
        except BaseException as error:  # whatever the user's method raises
            text = f"{type(error).__name__}: {error}"
            raise HookFailed(f"{name} failed: {text}", {"hook": name}) from error
