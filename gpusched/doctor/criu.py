"""Finding CRIU and trying it: a small process with a listening socket is saved and brought back.

``criu check`` is no evidence: it is content with combinations of kernel and CRIU that lose every socket.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from gpusched.doctor import programs
from gpusched.doctor.judge_host import criu_is_too_old, parse_version
from gpusched.doctor.readings import Criu, Subject

PRIVATE_COPY: Final = Path("/opt/gpusched/criu")
VERSION_TIMEOUT_S: Final = 5.0
PROBE_TIMEOUT_S: Final = 20.0


def read(subject: Subject) -> Criu:
    """Blocks for at most half a minute; the trial needs root and takes about half a second."""
    path = find(subject.criu)
    if path is None:
        return Criu()
    version = _version(path)
    if os.geteuid() != 0 or criu_is_too_old(version, parse_version(platform.release())):
        return Criu(path=path, version=version)
    return Criu(path=path, version=version, probe=probe(path))


def find(chosen: str | None, private: Path = PRIVATE_COPY) -> str | None:
    """The one that was named (only that one), else on the PATH, else gpusched's own copy."""
    if chosen:
        return shutil.which(chosen)
    if path := shutil.which("criu"):
        return path
    return shutil.which(str(private / "criu" if private.is_dir() else private))


def _version(path: str) -> tuple[int, ...]:
    try:
        ran = programs.run([path, "--version"], VERSION_TIMEOUT_S)
    except OSError:
        return ()
    match = re.search(r"Version:\s*(\S+)", ran.stdout)
    return parse_version(match[1]) if match else ()


def probe(path: str, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """What went wrong in the trial; empty when it went well. Root only.

    It runs in pid and mount namespaces of its own, as managed trees do: all of it ends with their first process.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return "the program unshare (util-linux) is missing"
    with tempfile.TemporaryDirectory(
        prefix="gpusched-criu-", ignore_cleanup_errors=True
    ) as scratch:
        command = [unshare, "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
        command += [sys.executable, "-P", "-m", "gpusched.doctor.criu_probe", path, scratch]
        try:
            ran = programs.run(command, timeout_s)
        except OSError as error:
            return str(error)
    if ran.code is None:
        return f"it did not end within {timeout_s:g} s"
    try:
        return str(json.loads(ran.stdout)["error"])
    except (ValueError, KeyError):
        return ran.complaint
