"""The command lines of CRIU: the only place that knows its options, and why each is there. Pure.

Everything is named by descriptors that CRIU inherits (``/proc/self/fd/N``): what a path leads to inside the namespaces
of a tree is decided there, and an image must not be.

Without ``-o`` the log goes to standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

_COMMON: Final = (
    "-v3",
    "--manage-cgroups=ignore",  # a tree is put into its group by who starts it
    "--tcp-close",  # nobody at the other end waits for hours: established connections are closed
    "--file-locks",
    "--link-remap",  # semaphores and the like: files without a name that others still have open
    "--no-default-config",
)


def dump(pid: int, images_fd: int, plugins_fd: int, ghost_limit_bytes: int) -> list[str]:
    """Saves the tree below ``pid`` (as its namespace counts) and leaves it stopped, so that it can go on.

    ``plugins_fd`` is an empty directory: an installed CUDA plugin would call the driver on its own account.
    """
    return [
        *("dump", "-t", str(pid), "-D", _path(images_fd), "-W", _path(images_fd)),
        *("--leave-stopped", "--network-lock", "skip", "--ghost-limit", str(ghost_limit_bytes)),
        *_common(plugins_fd),
    ]


def restore(
    images_fd: int,
    work_fd: int,
    plugins_fd: int,
    *,
    inherited: Mapping[str, int],
    leave_stopped: bool = True,
) -> list[str]:
    """Brings a tree back, and ends. ``inherited``: path as dumped -> descriptor that takes the file's place."""
    given: Sequence[str] = [
        option
        for path, fd in inherited.items()
        for option in ("--inherit-fd", f"fd[{fd}]:{path.lstrip('/')}")
    ]
    return [
        *("restore", "-d", "-D", _path(images_fd), "-W", _path(work_fd)),
        *(("--leave-stopped",) if leave_stopped else ()),
        *given,
        *_common(plugins_fd),
    ]


def settings(pipe_fd: int) -> list[str]:
    """Has CRIU read settings from a pipe, before it does anything: whoever holds the other end can keep it waiting."""
    return ["--config", _path(pipe_fd)]


def _common(plugins_fd: int) -> list[str]:
    return [*_COMMON, "-L", _path(plugins_fd)]


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"
