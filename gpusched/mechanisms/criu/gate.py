"""Where CRIU waits, once it has loaded its libraries, until something was done that must not be there before.

It is told to read more settings, from a named pipe: opening one for reading waits for who opens it for writing, and
that is refused until somebody reads. Blocking.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Final, Self

from gpusched.mechanisms.criu import command

_POLL_S: Final = 0.001


class Gate:
    """Nothing at all where there is no ``work``."""

    def __init__(self, work: Callable[[], None] | None) -> None:
        self._work = work
        self.fds: list[int] = []
        self.options: list[str] = []
        if work is not None:
            with tempfile.TemporaryDirectory(prefix="gpusched-criu-") as directory:
                path = f"{directory}/settings"
                os.mkfifo(path, 0o600)
                self.fds = [os.open(path, os.O_PATH | os.O_CLOEXEC)]
            self.options = command.settings(self.fds[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)

    def let_through(self, running: subprocess.Popen[bytes], timeout_s: float) -> None:
        """Waits until CRIU is there, does the work and lets it go on; returns when it has ended before that.

        Raises what the work raises (then CRIU must be ended while it waits), TimeoutExpired, OSError.
        """
        if self._work is None:
            return
        deadline = time.monotonic() + timeout_s
        while running.poll() is None:
            if (end := self._open()) is not None:
                self.fds.append(end)
                self._work()
                os.close(self.fds.pop())
                return
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(running.args, timeout_s)
            time.sleep(_POLL_S)

    def _open(self) -> int | None:
        """The end to write to; None until somebody reads."""
        try:
            path = f"/proc/self/fd/{self.fds[0]}"
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
