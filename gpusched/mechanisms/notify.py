"""Telling systemd that the daemon is ready, or about to end (the protocol of sd_notify(3)).

Does not cover: being started by something else; without NOTIFY_SOCKET in the environment every call does nothing.
"""

from __future__ import annotations

import logging
import os
import socket

logger = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Sends ``state``, such as ``READY=1``, to whoever started the daemon and wants to know. Never raises or blocks."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # how a name in the abstract namespace is written
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(state.encode(), address)
    except OSError as error:
        logger.warning("the service manager was not told state=%s reason=%s", state, error)
