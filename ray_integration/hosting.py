"""Starting the host of a model through the daemon, and finding one again that is there already.

Covers: the host's name, GPUs, environment and module path; whether a host that is found may be used. Does not cover:
calls (``links.py``), what happens when it is frozen (``proxy.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gpusched import errors, types
from gpusched.client import GpuSched
from gpusched.preload import library, not_preloaded
from ray_integration import places
from ray_integration.errors import HostLost
from ray_integration.links import Links
from ray_integration.places import HOST_SOCKET, PRIVATE_SOCKET, About

#: Seconds that a host gets until it listens: an interpreter's start on a busy machine.
START_TIMEOUT_S: Final = 60.0
#: Left behind once the constructor has returned: what a frozen host cannot be asked.
READY: Final = "ready"
_LOG_LINES: Final = 20


def find(client: GpuSched, name: str) -> types.ProcessStatus | None:
    """The daemon's entry of this name. Raises DaemonUnavailable."""
    return next((found for found in client.processes() if found["name"] == name), None)


def socket_finder(client: GpuSched, about: About) -> Callable[[], Path]:
    """A function that gives the path at which the model's host can be reached now.

    It asks the daemon: a host that was on disk has another pid. Without a daemon it gives what it gave last.
    """
    last = about.directory / HOST_SOCKET

    def path() -> Path:
        nonlocal last
        with contextlib.suppress(errors.Unavailable):
            found = find(client, about.name)
            if found is not None and found["isolated"]:
                last = Path(f"/proc/{found['pid']}/root{PRIVATE_SOCKET}")
        return last

    return path


def is_usable(found: types.ProcessStatus | None, about: About) -> bool:
    """Whether a restarted proxy can go on with this host: it lives, and its model was made."""
    gone = {"dead", "failed", "starting"}
    return found is not None and found["state"] not in gone and (about.directory / READY).exists()


def choose_gpus(
    ray_ids: Sequence[str], wanted: Sequence[int] | None, known: Sequence[types.GpuStatus]
) -> tuple[int, ...]:
    """The daemon's numbers of the GPUs that Ray gave this actor, or of those that were asked for.

    Ray says a number of the machine, or what stands in its node's CUDA_VISIBLE_DEVICES: a UUID or the start of one.
    Raises InvalidRequest for a GPU that the daemon does not know.
    """
    if wanted is not None:
        return tuple(wanted)
    found = []
    for ray_id in ray_ids:
        match = [
            gpu["index"]
            for gpu in known
            if (
                str(gpu["index"]) == ray_id
                if ray_id.isdecimal()
                else gpu["uuid"].startswith(ray_id)
            )
        ]
        if len(match) != 1:
            listed = ", ".join(f"{gpu['index']} ({gpu['uuid']})" for gpu in known)
            raise errors.InvalidRequest(
                f"Ray gave this actor GPU {ray_id!r}, which is none of the daemon's: {listed}; "
                "start ray with --num-gpus as the daemon has them"
            )
        found.append(match[0])
    return tuple(found) or (0,)


def host_environment(own: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment for its host: without what makes a process part of a Ray cluster.

    And without the library that the worker itself may have: whether the host gets it is the daemon's to say.
    """
    kept = {
        name: value
        for name, value in own.items()
        if not name.startswith("RAY_") and name != "CUDA_VISIBLE_DEVICES"
    }
    # Else the first use of Ray in the user's class would start a cluster of its own in the host.
    return {**not_preloaded(library(), kept), **more, "RAY_ENABLE_AUTO_CONNECT": "0"}


def start(
    client: GpuSched, about: About, env: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    """Starts the host under its name. Blocks until it runs; it need not listen yet.

    A dead or unusable one of the same name is removed first. Raises what ``run`` raises.
    """
    directory = about.directory
    for left in (READY, HOST_SOCKET):
        (directory / left).unlink(missing_ok=True)
    old = find(client, about.name)
    if old is not None:
        client.kill(about.name, force=True)
    about.write()
    client.run(
        about.name,
        command(directory / "start.json", "host", str(directory)),
        gpus=about.gpus,
        env=host_environment(os.environ, env),
        **options,
    )


def command(start: Path, module: str, argument: str) -> list[str]:
    """What runs a module of this package as this interpreter would; writes the file that it begins with."""
    start.write_text(json.dumps({"sys_path": sys.path}))
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    begin = str(Path(__file__).with_name("begin.py"))
    return [sys.executable, *flags, begin, str(start), f"ray_integration.{module}", argument]


def await_listening(client: GpuSched, about: About, links: Links, timeout_s: float) -> None:
    """Blocks until the host answers. Raises HostLost with its last words when it ends, or does not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            link, _ = links.connect("control", timeout_s=0.5)
        except HostLost as error:
            found = find(client, about.name)
            ended = found is None or found["state"] in {"dead", "failed"}
            if ended or time.monotonic() > deadline:
                raise HostLost(
                    f"the host {about.name} {'ended' if ended else f'did not listen within {timeout_s:g} s'}; "
                    f"its log ends:\n{last_words(client, about.name)}"
                ) from error
        else:
            link.close()
            return


def last_words(client: GpuSched, name: str) -> str:
    try:
        return client.logs(name, _LOG_LINES)["output"]
    except errors.GpuschedError as error:
        return f"(no log: {error})"


def wait_for_lock(directory: Path, timeout_s: float) -> int:
    """The lock that says "the proxy lives"; waits for one that is about to die. Raises Unavailable."""
    deadline = time.monotonic() + timeout_s
    while (descriptor := places.lock(directory / "lock")) is None:
        if time.monotonic() > deadline:
            raise errors.Unavailable(
                f"another proxy of this actor still has {directory}/lock after {timeout_s:g} s"
            )
        time.sleep(0.05)
    return descriptor
