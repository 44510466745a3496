"""Saves a small process with a listening socket to disk, brings it back, and talks to it.

    unshare --pid --mount --fork --mount-proc --kill-child python -m gpusched.doctor.criu_probe CRIU DIRECTORY

The first process of a pid namespace of its own, so that neither a pid nor a process is left over. Prints
``{"error": ""}`` when all went well, else what did not.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

STEP_TIMEOUT_S: Final = 8.0
#: Answers one byte to everybody who connects; says its port in a file that appears whole.
_TARGET: Final = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
with open("port.new", "w") as file:
    file.write(str(listener.getsockname()[1]))
os.rename("port.new", "port")
while True:
    connection, _ = listener.accept()
    connection.sendall(b"!")
    connection.close()
"""
_COMMON: Final = (
    *("-v3", "--manage-cgroups=ignore", "--tcp-close", "--file-locks", "--link-remap"),
    "--no-default-config",
)


class Failed(Exception):
    """One step did not do what it should; the text says which and how."""


def main() -> int:
    error = ""
    try:
        _try(sys.argv[1], Path(sys.argv[2]))
    except (Failed, OSError, subprocess.SubprocessError) as failure:
        error = str(failure)
    print(json.dumps({"error": error}))  # noqa: T201 - this is how the answer gets out
    return 0


def _try(criu: str, directory: Path) -> None:
    os.chdir(directory)
    for name in ("image", "work", "no-plugins"):
        (directory / name).mkdir()
    target = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _TARGET],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    port = _wait_for_port(directory / "port")
    _ask(port, "before it was saved")
    common = [*_COMMON, "-L", str(directory / "no-plugins"), "-D", "image", "-W", "work"]
    dump = ["dump", "-t", str(target.pid), "-o", "dump.log", "--network-lock", "skip", *common]
    _run([criu, *dump], directory / "work" / "dump.log")
    target.wait(STEP_TIMEOUT_S)  # a successful dump ends it; the pid must be free to be taken again
    restore = ["restore", "-d", "-o", "restore.log", *common]
    _run([criu, *restore], directory / "work" / "restore.log")
    _ask(port, "after it was brought back")


def _run(argv: list[str], log: Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False)
    if done.returncode == 0:
        return
    lines = [
        *done.stderr.splitlines(),
        *(log.read_text(errors="replace").splitlines() if log.exists() else ()),
    ]
    errors = [line for line in lines if "Error" in line] or lines or ["no word why"]
    raise Failed(f"{argv[1]} ended with {done.returncode}: {errors[0].strip()}")


def _wait_for_port(file: Path) -> int:
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise Failed("the process for the trial did not start")
        time.sleep(0.005)
    return int(file.read_text())


def _ask(port: int, when: str) -> None:
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), STEP_TIMEOUT_S) as connection,
    ):
        connection.settimeout(STEP_TIMEOUT_S)
        if connection.recv(1) == b"!":
            return
    raise Failed(f"its listening socket did not answer {when}")


if __name__ == "__main__":
    sys.exit(main())
