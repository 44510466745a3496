"""Files laid over others in the mount namespace of a tree, without any program that would run there. Root only.

A program in there would itself load what lies over the system's libraries. So the calls are made by a thread that
enters the namespace, names everything by descriptors, and ends. Linux 5.2. Blocking, for microseconds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429  # on every architecture
_OPEN_TREE_CLONE: Final = 1
_AT_EMPTY_PATH: Final = 0x1000
_MOVE_FROM_FD, _MOVE_TO_FD = 0x4, 0x40
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def lay(namespace: int, pairs: Sequence[tuple[int, int]], laid: list[int]) -> None:
    """Lays a file over another, for each pair of O_PATH descriptors that were opened in that mount namespace.

    ``laid`` gets a descriptor for each that lies there, also when a later one fails (OSError); it is the caller's.
    """

    def work() -> None:
        for source, target in pairs:
            flags = _AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC
            copy = _checked(_libc.syscall(_SYS_OPEN_TREE, source, b"", flags))
            laid.append(copy)
            how = _MOVE_FROM_FD | _MOVE_TO_FD
            _checked(_libc.syscall(_SYS_MOVE_MOUNT, copy, b"", target, b"", how))

    _perform(namespace, work)


def lift(namespace: int, laid: Sequence[int]) -> None:
    """Takes away what ``lay`` has laid, wherever it is by now. Raises OSError once all were tried.

    What never came to lie anywhere is let go with its descriptor.
    """
    descriptors = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def work() -> None:
        os.fchdir(descriptors)  # of this thread alone; /proc of the namespace does not know us
        failed: OSError | None = None
        for one in laid:
            try:
                _checked(_libc.umount2(b"%d" % one, _MNT_DETACH))
            except OSError as error:
                # It never lay there, or a user has removed what it lay on, and it with that.
                failed = failed if error.errno == errno.EINVAL else failed or error
        if failed is not None:
            raise failed

    try:
        _perform(namespace, work)
    finally:
        os.close(descriptors)


def _perform(namespace: int, work: Callable[[], object]) -> None:
    """On a thread of its own, which is the only one to see that namespace."""
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            _checked(_libc.unshare(_CLONE_FS))  # threads share their root and directory
            _checked(_libc.setns(namespace, _CLONE_NEWNS))
            work()
        except BaseException as error:  # noqa: BLE001 - raised where it was asked for
            failed.append(error)

    thread = threading.Thread(target=enter, name="mounts")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
