"""Which Unix sockets are connected to which: what the kernel's socket diagnostics tell and /proc does not. Blocking."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from typing import Final, NamedTuple

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SHOW_NAME_AND_PEER: Final = 1 | 4
_NAME, _PEER = 0, 2
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBHIIIII")
_MESSAGE: Final = struct.Struct("=BBBBIII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_CLONE_NEWNET: Final = 0x40000000
_TIMEOUT_S: Final = 5.0


class UnixSocket(NamedTuple):
    """``peer`` is the inode of the other end; None when it is not connected. ``name`` is empty, a path or @abstract."""

    inode: int
    name: str
    peer: int | None


def read(network_namespace: int | None = None) -> dict[int, UnixSocket]:
    """All Unix sockets of a network namespace (a descriptor; ours by default) by inode. Raises OSError.

    A thread of its own enters the namespace: only that one thread is in it, and it ends.
    """
    result: list[dict[int, UnixSocket] | OSError] = []

    def ask() -> None:
        try:
            if network_namespace is not None:
                _enter(network_namespace)
            result.append(_ask())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=ask, name="unix-peers", daemon=True)
    thread.start()
    thread.join(2 * _TIMEOUT_S)
    answer = result[0] if result else TimeoutError("no answer from the kernel's socket diagnostics")
    if isinstance(answer, OSError):
        raise answer
    return answer


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _ask() -> dict[int, UnixSocket]:
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_NAME_AND_PEER, 0, 0)
    header = _HEADER.pack(
        _HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0
    )
    found: dict[int, UnixSocket] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.send(header + request)
        while True:
            messages, is_last = parse(connection.recv(65536))
            found.update((one.inode, one) for one in messages)
            if is_last:
                return found


def parse(data: bytes) -> tuple[list[UnixSocket], bool]:
    """The sockets in one answer, and whether it was the last. Raises OSError when it is an error."""
    found: list[UnixSocket] = []
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        body = data[_HEADER.size : length]
        if kind == _NLMSG_DONE:
            return found, True
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", body)[0]
            raise OSError(number, os.strerror(number))
        found.append(_parse_socket(body))
        data = data[_aligned(length) :]
    return found, False


def _parse_socket(body: bytes) -> UnixSocket:
    inode = _MESSAGE.unpack_from(body)[4]
    name, peer = "", None
    offset = _MESSAGE.size
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        value = body[offset + _ATTRIBUTE.size : offset + length]
        if kind == _NAME:
            name = os.fsdecode(value.rstrip(b"\0").replace(b"\0", b"@"))
        elif kind == _PEER:
            peer = struct.unpack("=I", value)[0]
        offset += max(_aligned(length), _ATTRIBUTE.size)
    return UnixSocket(inode, name, peer)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
