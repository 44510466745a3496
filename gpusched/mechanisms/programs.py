"""Running small programs that may hang: output to a file, a time limit, and no waiting for what cannot be ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

#: A program in an uninterruptible call of the driver's does not even end on SIGKILL.
_END_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """``code`` is None when the time ran out; the output is what there was until then."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The last line of its errors."""
        return (self.stderr.strip().splitlines() or [f"ended with {self.code}"])[-1]


def run(argv: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None) -> Ran:
    """Blocks for at most ``timeout_s`` and a second; then the program and its process group are killed.

    Raises OSError when it cannot be started.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=None if env is None else dict(env),
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                _kill(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ran(code=code, stdout=texts[0], stderr=texts[1])


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
