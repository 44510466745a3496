"""Saves a small process with a listening socket to disk, brings it back, and talks to it.

    unshare --pid --mount --fork --mount-proc --kill-child python -m gpusched.mechanisms.criu.probe CRIU DIRECTORY

The first process of a pid namespace of its own, so that neither a pid nor a process is left over. Prints
``{"error": "", "executable": PATH}`` when all went well, else what did not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from gpusched.mechanisms.criu import command

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


class Failed(Exception):
    """One step did not do what it should; the text says which and how."""


def main() -> int:
    error, executable = "", ""
    try:
        executable = _try(sys.argv[1], Path(sys.argv[2]))
    except (Failed, OSError, subprocess.SubprocessError) as failure:
        error = str(failure)
    print(json.dumps({"error": error, "executable": executable}))  # noqa: T201 - how the answer gets out
    return 0


def _try(criu: str, directory: Path) -> str:
    """Returns what /proc/PID/exe of the CRIU at work was."""
    os.chdir(directory)
    images, work, plugins = (_directory(directory / name) for name in ("image", "work", "none"))
    target = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _TARGET],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    port = _wait_for_port(directory / "port")
    _ask(port, "before it was saved")
    fds = (images, work, plugins)
    executable = _run([criu, *command.dump(target.pid, images, plugins, 1 << 20)], fds)
    target.send_signal(signal.SIGKILL)
    target.wait(STEP_TIMEOUT_S)  # its pid must be free to be taken again
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        raise Failed("its listening socket answers while nobody has it")
    again = command.restore(images, work, plugins, inherited={}, leave_stopped=False)
    _run([criu, *again], fds)
    _ask(port, "after it was brought back")
    if Path(executable).name in ("sh", "dash", "bash", "busybox"):
        raise Failed("it is a script that does not exec CRIU, so nobody could tell a CRIU at work")
    return executable


def _directory(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def _run(argv: list[str], fds: tuple[int, ...]) -> str:
    """Runs CRIU; returns the program that the process had become by its end."""
    log, executable = Path("criu.log"), ""
    deadline = time.monotonic() + STEP_TIMEOUT_S
    with log.open("wb") as file:
        running = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=fds
        )
    try:
        while running.poll() is None:
            with contextlib.suppress(OSError):
                executable = os.readlink(f"/proc/{running.pid}/exe")  # noqa: PTH115 - no path of ours
            if time.monotonic() > deadline:
                raise Failed(f"{argv[1]} did not end within {STEP_TIMEOUT_S:g} s")
            time.sleep(0.001)
    finally:
        running.kill()
        running.wait()
    if running.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        # That one is harmless, and there on every run.
        errors = [line for line in lines if "Error" in line and "RLIMIT_NOFILE" not in line]
        word = (errors or lines[-1:] or ["no word why"])[0]
        raise Failed(f"{argv[1]} ended with {running.returncode}: {word.strip()}")
    return executable


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
