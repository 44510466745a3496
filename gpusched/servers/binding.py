"""Taking a path for the socket, in a directory where anybody may have put something first.

Covers: a bound socket at a path, atomically, whatever lay there. Does not cover: who connects (``unix.py``).
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
import struct
from pathlib import Path

from gpusched import errors


def bind(path: Path) -> socket.socket:
    """A bound socket that every user may connect to (who they are decides what they may do).

    Raises Unavailable when a live daemon serves the path, InvalidRequest for a path that is too long. In a
    world-writable directory any user may have put anything there, and may put it back at once: so the socket gets a
    name that nobody knows and takes the path by rename.
    """
    fresh = path.with_name(f".gpusched-{secrets.token_hex(8)}")
    longest = max(len(os.fsencode(each)) for each in (path, fresh))
    if longest > 107:
        raise errors.InvalidRequest(f"the socket path is longer than 107 bytes: {path}")
    if owner_answers(path):
        raise errors.Unavailable(
            f"a daemon serves {path} already; stop it, or choose another with --socket"
        )
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o111)
    try:
        server.bind(str(fresh))
        make_way(path)
        fresh.rename(path)
    except OSError as error:
        server.close()
        fresh.unlink(missing_ok=True)
        raise errors.Unavailable(
            f"cannot listen at {path}: {error.strerror}; choose another path with --socket"
        ) from error
    except BaseException:
        server.close()
        fresh.unlink(missing_ok=True)
        raise
    finally:
        os.umask(old)
    return server


def make_way(path: Path) -> None:
    """Raises Unavailable for what is neither a socket nor a link, but for another user's: that is moved aside.

    Nobody may keep root's daemon from starting by a file in /tmp. Raises OSError for what is not ours to move.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISSOCK(found.st_mode) or stat.S_ISLNK(found.st_mode):
        return  # the rename replaces it
    if found.st_uid in (0, os.geteuid()):
        raise errors.Unavailable(f"{path} is not a socket; it was left as it is")
    path.rename(path.with_name(f"{path.name}.of-uid-{found.st_uid}-{secrets.token_hex(4)}"))


def owner_answers(path: Path) -> bool:
    """Whether root or we listen at ``path`` now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return False
        uid: int = struct.unpack("3i", raw)[1]
        return uid in (0, os.geteuid())
