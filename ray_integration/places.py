"""Where models, their proxies and the agents of a node find one another: private directories and locks.

    /tmp/gpusched-ray-UID/           0700; $GPUSCHED_RAY_DIR in its place
        node-NODE.agent              locked by the node's agent while it lives
        node-NODE.keeper             locked by the node's keeper while it lives
        ACTOR/                       one model
            about.json               who it is; written before its host is started
            lock                     locked by the proxy while it lives: the kernel lets go when it dies
            start.json, host         what the host begins with, and its socket (see ``own_socket``)
            recipe                   what replicas of the model are made of
            proxy                    the proxy's socket, for the agent
            handle                   of an attached actor, for a new agent: there the agent itself is the proxy

Several nodes of a cluster may be on one machine (tests have that), so each model says which node is its own.
Standard library only: the keeper is small.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from gpusched import errors

#: The name of the host's socket in the model's directory.
HOST_SOCKET: Final = "host"
#: Where a host listens that has a /dev/shm of its own, and what the first process of such a tree is called.
PRIVATE_SOCKET: Final = "/dev/shm/gpusched-host"  # noqa: S108 - nobody else's, see ``own_socket``
_TREE: Final = "gpusched-tree"
_NAME_CHARACTERS: Final = re.compile(r"[^A-Za-z0-9._-]+")
_ACTOR_ID: Final = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """One model: its actor and node, and what the daemon at ``socket`` calls its host and its GPUs."""

    actor_id: str
    node_id: str
    name: str
    socket: str
    gpus: tuple[int, ...]
    class_name: str
    #: An actor that was not made with ``freezable``: its worker itself is what the daemon freezes.
    attached: bool = False

    @property
    def directory(self) -> Path:
        return base() / self.actor_id

    def write(self) -> None:
        """Whole or not at all."""
        part = self.directory / "about.json.part"
        part.write_text(json.dumps(asdict(self)))
        part.rename(self.directory / "about.json")

    @classmethod
    def read(cls, actor_id: str) -> About | None:
        """None where there is no such model, or not yet."""
        if not _ACTOR_ID.fullmatch(actor_id):
            return None
        try:
            fields = json.loads((base() / actor_id / "about.json").read_text())
            return cls(**{**fields, "gpus": tuple(fields["gpus"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def remove(self) -> None:
        """Forgets the model; its sockets and locks go too."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def proxy_lives(self) -> bool:
        return is_locked(self.directory / "lock")


def own_socket(directory: Path) -> Path:
    """Where this process, the host of the model in ``directory``, is to listen.

    What comes back from an image has its sockets where they were: copies of a host would take one path from another,
    and from the original. So a host in namespaces of its own listens in its own /dev/shm, which is below
    /proc/PID/root from outside, for its user and root alone. Any other host can have no copies.
    """
    with contextlib.suppress(OSError):
        if Path("/proc/1/comm").read_text().strip() == _TREE:
            return Path(PRIVATE_SOCKET)
    return directory / HOST_SOCKET


def base() -> Path:
    """The directory of this user's models, made where it is missing. Raises PermissionDenied for somebody else's."""
    given = os.environ.get("GPUSCHED_RAY_DIR")
    path = Path(given) if given else Path(f"/tmp/gpusched-ray-{os.geteuid()}")  # noqa: S108 - checked here
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=bool(given))
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise errors.PermissionDenied(
            f"{path} is not a directory that uid {os.geteuid()} alone may enter; remove it, or set GPUSCHED_RAY_DIR"
        )
    return path


def models(node_id: str) -> Iterator[About]:
    """The models of one node, those whose proxy has died too."""
    for entry in base().iterdir():
        about = About.read(entry.name)
        if about is not None and about.node_id == node_id:
            yield about


def agent_lock(node_id: str) -> Path:
    return base() / f"node-{node_id}.agent"


def keeper_lock(node_id: str) -> Path:
    return base() / f"node-{node_id}.keeper"


def lock(path: Path) -> int | None:
    """Locks a file for as long as this process lives, or the descriptor is open; None when another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(descriptor: int) -> None:
    os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a living process has it; a look, which takes the lock for a moment and may make another's try fail."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def keeper_name(node_id: str) -> str:
    """What the daemon calls a node's keeper."""
    return process_name("ray-keeper", node_id)


def process_name(label: str, ident: str) -> str:
    """A name for the daemon: what people call the model, and enough of its id to be the only one."""
    clean = _NAME_CHARACTERS.sub("-", label).strip("-._")[:48] or "model"
    return f"{clean}-{ident[:12]}"
