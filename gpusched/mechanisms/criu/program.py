"""Finding a CRIU that works here: the first candidate that saves a process and brings it back.

``criu check`` is no evidence: it is content with combinations of kernel and CRIU that lose every socket. See
``probe.py`` for the trial.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpusched.mechanisms import programs

PRIVATE_COPY: Final = Path("/opt/gpusched/criu")
VERSION_TIMEOUT_S: Final = 5.0
PROBE_TIMEOUT_S: Final = 20.0
#: For all candidates together.
SEARCH_TIMEOUT_S: Final = 45.0
#: Why a candidate was not tried.
NOT_ROOT: Final = "not tried: that needs root"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A CRIU that passed its trial. ``executable``: what /proc/PID/exe shows while it works (not a wrapper)."""

    path: str
    version: tuple[int, ...]
    executable: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """``reason`` says what it did, or could not do; ``version`` is empty where it did not say one."""

    path: str
    version: tuple[int, ...] = ()
    reason: str

    def __str__(self) -> str:
        version = ".".join(map(str, self.version))
        return f"{self.path}{' ' + version if version else ''}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """``program`` is the one to use, or None; ``rejected`` are those before it, in order."""

    program: Program | None = None
    rejected: tuple[Rejected, ...] = ()

    @property
    def why_not(self) -> str:
        """Why there is no disk tier; empty when there is one."""
        if self.program is not None:
            return ""
        if not self.rejected:
            return "CRIU was not found"
        return "no CRIU works here: " + "; ".join(map(str, self.rejected))


def find(chosen: str | None = None, private: Path = PRIVATE_COPY) -> Found:
    """The first candidate that passes its trial. Blocks: half a second for each, 50 s at most. Root only."""
    deadline = time.monotonic() + SEARCH_TIMEOUT_S
    rejected: list[Rejected] = []
    for path in candidates(chosen, private):
        tried = examine(path, max(1.0, min(PROBE_TIMEOUT_S, deadline - time.monotonic())))
        if isinstance(tried, Program):
            return Found(program=tried, rejected=tuple(rejected))
        rejected.append(tried)
    return Found(rejected=tuple(rejected))


def candidates(chosen: str | None, private: Path = PRIVATE_COPY) -> list[str]:
    """The one that was named (there or not), the one on the PATH, gpusched's own copy; each once."""
    paths = [str(Path(shutil.which(chosen) or chosen).absolute())] if chosen else []
    paths += [path for name in ("criu", f"{private}/bin/criu") if (path := shutil.which(name))]
    return list(dict.fromkeys(paths))


def examine(path: str, timeout_s: float = PROBE_TIMEOUT_S) -> Program | Rejected:
    """Asks for the version, then makes the trial. Blocks for ``VERSION_TIMEOUT_S + timeout_s`` at most. Root only."""
    if shutil.which(path) is None:
        return Rejected(path=path, reason="is not there, or cannot be executed")
    version = read_version(path)
    if is_too_old(version, parse_version(platform.release())):
        reason = f"too old for kernel {platform.release()}, which needs 4.2"
        return Rejected(path=path, version=version, reason=reason)
    error, executable = probe(path, timeout_s)
    if error:
        return Rejected(path=path, version=version, reason=error)
    return Program(path=path, version=version, executable=executable)


def read_version(path: str) -> tuple[int, ...]:
    """Empty when it does not say. Blocks for ``VERSION_TIMEOUT_S`` at most."""
    try:
        ran = programs.run([path, "--version"], VERSION_TIMEOUT_S)
    except OSError:
        return ()
    match = re.search(r"Version:\s*(\S+)", ran.stdout)
    return parse_version(match[1]) if match else ()


def parse_version(text: str) -> tuple[int, ...]:
    """``"6.18.44-generic"`` -> ``(6, 18, 44)``; empty when it begins with no number."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def is_too_old(version: Sequence[int], kernel: Sequence[int]) -> bool:
    """Kernels from 6.16 on need 4.2: older ones do not start, or lose every socket."""
    return bool(version) and tuple(kernel) >= (6, 16) and tuple(version) < (4, 2)


def probe(path: str, timeout_s: float = PROBE_TIMEOUT_S) -> tuple[str, str]:
    """(what went wrong in the trial, the executable that did the work); the first is empty when it went well.

    It runs in pid and mount namespaces of its own, as managed trees do: all of it ends with their first process.
    Root only.
    """
    if os.geteuid() != 0:
        return NOT_ROOT, ""
    unshare = shutil.which("unshare")
    if unshare is None:
        return "the program unshare (util-linux) is missing", ""
    with tempfile.TemporaryDirectory(
        prefix="gpusched-criu-", ignore_cleanup_errors=True
    ) as scratch:
        command = [unshare, "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
        command += [sys.executable, "-P", "-m", "gpusched.mechanisms.criu.probe", path, scratch]
        try:
            ran = programs.run(command, timeout_s)
        except OSError as error:
            return str(error), ""
    if ran.code is None:
        return f"the trial did not end within {timeout_s:g} s", ""
    try:
        answer = json.loads(ran.stdout)
        return str(answer["error"]), str(answer["executable"])
    except (ValueError, KeyError):
        return f"the trial failed: {ran.complaint}", ""
