"""The helper process that makes the driver's calls, so that one that hangs or crashes takes no daemon with it.

Run by ``driver_client``: requests arrive as JSON lines on standard input, answers leave on standard output, each
call on a thread of its own. When standard input closes (the daemon ended), calls under way that change something are
waited out: a half made checkpoint is worse than a process that lingers.

    in   {"id": 7, "call": "lock", "args": {"pid": 4711, "timeout_s": 10}}
    out  {"id": 7, "result": 0.0004}          or  {"id": 7, "error": {"code": ..., "error": ..., "details": ...}}
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from gpusched import errors
from gpusched.ports import DriverApi

#: What may be called, so that a name from the wire is never looked up blindly.
CALLS: Final = frozenset(
    {
        "describe",
        "usage",
        "states",
        "lock",
        "checkpoint",
        "restore",
        "unlock",
        "absorb",
        "obstacles",
    }
)
#: Those that change something: half-made they are worse than a process that lingers.
CHANGING: Final = frozenset({"lock", "checkpoint", "restore", "unlock", "absorb"})
#: How long such calls under way are waited for once the daemon is gone.
LINGER_S: Final = 900.0
#: Calls at the same time; further ones wait. More than a machine has GPU processes to move at once.
MAX_CALLS: Final = 512


def open_driver(options: argparse.Namespace) -> DriverApi:
    """Builds the backend that the options name. Raises Unsupported when this machine cannot run it."""
    if options.backend == "sim":
        from gpusched.mechanisms.sim.driver import SimDriver

        directory = Path(options.sim_dir)
        if not options.sim_gpus:
            return SimDriver(directory)
        return SimDriver.create(directory, options.sim_gpus, options.sim_vram_bytes)
    from gpusched.mechanisms.cuda.driver import CudaDriver

    driver = CudaDriver.open(allow_old_driver=options.allow_old_driver)
    if not options.pool_dir:
        return driver
    from gpusched.mechanisms.cuda.direct import DirectDriver
    from gpusched.mechanisms.cuda.pool import Pool

    return DirectDriver(driver, Pool(Path(options.pool_dir), of_another=options.pool_of_another))


class Host:
    """Answers requests until standard input closes."""

    def __init__(self, opener: Callable[[], DriverApi], out: BinaryIO) -> None:
        self._opener = opener
        self._write_lock = threading.Lock()
        self._out = out

    def serve(self) -> None:
        failure: errors.GpuschedError | None = None
        driver: DriverApi | None = None
        try:
            driver = self._opener()
        except errors.GpuschedError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the daemon must hear of it, whatever it is
            failure = errors.DriverError(f"the driver cannot be opened: {error!r}")
        # Threads are kept: to start one costs more than most calls. A hung one ends with the process (os._exit).
        pool = ThreadPoolExecutor(MAX_CALLS, "driver-call")
        changing: set[Future[None]] = set()
        for line in sys.stdin.buffer:
            request = msgspec.json.decode(line)
            if driver is None:
                self._answer(request["id"], error=failure)
                continue
            call = pool.submit(self._call, driver, request)
            if request["call"] in CHANGING:
                changing = {c for c in changing if not c.done()} | {call}
        wait(changing, timeout=LINGER_S)

    def _call(self, driver: DriverApi, request: dict[str, Any]) -> None:
        try:
            if request["call"] not in CALLS:
                raise errors.InternalError(f"no driver call {request['call']!r}")
            begun = time.monotonic()
            result = getattr(driver, request["call"])(**request["args"])
            if (
                result is None
            ):  # it changed something: how long the driver took is all there is to say
                result = time.monotonic() - begun
                if request["call"] in {"checkpoint", "restore"}:
                    result = _how(driver, request["args"]["pid"], result)
        except errors.GpuschedError as error:
            self._answer(request["id"], error=error)
        except Exception as error:  # noqa: BLE001 - an unforeseen error is an answer too
            self._answer(
                request["id"],
                error=errors.DriverError(f"{request['call']} failed: {error!r}"),
            )
        else:
            self._answer(request["id"], result=result)

    def _answer(
        self, request_id: int, *, result: object = None, error: errors.GpuschedError | None = None
    ) -> None:
        answer: dict[str, object] = {"id": request_id}
        if error is None:
            answer["result"] = result
        else:
            answer["error"] = errors.to_wire(error)
        data = msgspec.json.encode(answer) + b"\n"
        with self._write_lock:
            try:
                self._out.write(data)
                self._out.flush()
            except BrokenPipeError:
                pass  # the daemon is gone; the call is done all the same


def _how(driver: DriverApi, pid: int, seconds: float) -> dict[str, object]:
    """With the way that it went, where the backend has several."""
    last = getattr(driver, "last", None)
    path, phases_ms = ("driver", {}) if last is None else (last(pid).path, last(pid).ms)
    return {"seconds": seconds, "path": path, "phases_ms": phases_ms}


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpusched-driver-host")
    parser.add_argument("--backend", choices=("cuda", "sim"), required=True)
    parser.add_argument("--allow-old-driver", action="store_true")
    parser.add_argument("--pool-dir", default="", help="empty: all by the driver's own copy")
    parser.add_argument("--pool-of-another", action="store_true", help="a daemon may be using it")
    parser.add_argument("--sim-dir", default="")
    parser.add_argument("--sim-gpus", type=int, default=0, help="0: as the directory was made")
    parser.add_argument("--sim-vram-bytes", type=int, default=0)
    options = parser.parse_args()
    # A ctrl-C at the daemon's terminal reaches the whole process group; the daemon alone decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Answers go out by a descriptor of their own: a library that prints must not get between them.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    Host(lambda: open_driver(options), out).serve()
    os._exit(0)  # past any hung daemon thread


if __name__ == "__main__":
    main()
