"""What saving a tree will meet, read from /proc before it is touched: its size, and what is in the way. Blocking."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from gpusched.mechanisms import proc
from gpusched.mechanisms.namespaces import SHM
from gpusched.ports import DiskFacts, Identity, Member, Obstacle
from gpusched.units import KIB

#: CRIU's own files, and what a process still takes between the look and the dump.
_MARGIN: Final = 1.05


def look(
    main: Identity, members: Sequence[Member], log_path: str, own: Sequence[Path]
) -> DiskFacts:
    """``own``: directories outside the tree's namespaces that go into the image too."""
    size = sum(proc.resident_bytes(member.pid) for member in members)
    size += sum(bytes_of(path) for path in own)
    return DiskFacts(
        obstacles=tuple(_orphans(main, members)),
        need_bytes=int(size * _MARGIN) + 64 * KIB,
        shared_files=tuple(sorted(_shared_files(members, log_path))),
    )


def bytes_of(directory: Path) -> int:
    """What the files below take; holes take nothing."""
    found = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            found += path.lstat().st_blocks * 512
    return found


def _orphans(main: Identity, members: Sequence[Member]) -> Iterator[Obstacle]:
    """Members that hang on the init alone: CRIU saves what is below the main process, and they would be lost."""
    below = proc.scan().descendants({main.pid})
    for member in members:
        if member.pid not in below:
            yield Obstacle(
                pid=member.pid,
                kind="orphan",
                message=f"pid {member.pid} has lost its parent, and only what is below the main process can be saved; "
                "let it end first",
            )


def _shared_files(members: Sequence[Member], log_path: str) -> set[str]:
    """Plain files that members have open for writing, and that copies of them would have too."""
    found = set()
    for member in members:
        for entry in _names(f"/proc/{member.pid}/fd"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                link = f"/proc/{member.pid}/fd/{entry}"
                path, status = os.readlink(link), os.stat(link)  # noqa: PTH115, PTH116
                text = Path(f"/proc/{member.pid}/fdinfo/{entry}").read_text()
                flags = int(text.partition("flags:")[2].split()[0], 8)
                writable = flags & os.O_ACCMODE != os.O_RDONLY
                named = stat.S_ISREG(status.st_mode) and status.st_nlink > 0
                private = path == log_path or path.startswith(f"{SHM}/")
                if writable and named and not private:
                    found.add(path)
    return found


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)  # noqa: PTH208
    except OSError:
        return []
