"""Accounts: names, homes and groups from the system's databases. Implements ``ports.Users``."""

from __future__ import annotations

import asyncio
import os
import pwd

from gpusched.ports import User


class SystemUsers:
    """Looks accounts up on a thread: a directory service may take its time."""

    async def lookup(self, uid: int, gid: int) -> User:
        return await asyncio.to_thread(look_up, uid, gid)


def look_up(uid: int, gid: int) -> User:
    """The account of ``uid``; one that the system does not know has no groups but ``gid``."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return User(name=str(uid), home="/", shell="/bin/sh", groups=(gid,))
    groups = tuple(os.getgrouplist(entry.pw_name, gid))
    return User(
        name=entry.pw_name,
        home=entry.pw_dir or "/",
        shell=entry.pw_shell or "/bin/sh",
        groups=groups,
    )
