"""The whole examination: topics read side by side, each with its time limit, then judged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

import gpusched
from gpusched.doctor import findings, judge_gpus, judge_host, read_gpus, read_host
from gpusched.doctor.findings import Finding, Status
from gpusched.doctor.readings import Readings, Subject
from gpusched.mechanisms.criu import program as criu

#: Topic -> seconds that it may take, a little more than it grants itself; and whether the cuda backend needs it.
_TOPICS: Final[Mapping[str, tuple[float, bool]]] = {
    "gpus": (read_gpus.PROBE_TIMEOUT_S + 5, True),
    "host": (5.0, True),
    "disk": (5.0, True),
    "criu": (criu.SEARCH_TIMEOUT_S + 10, False),
    "daemon": (read_host.DAEMON_TIMEOUT_S + 5, False),
}
#: What a start without a usable driver is about.
_START: Final = ("gpus", "host")


def examine(subject: Subject) -> list[Finding]:
    """Blocks for about a second, and for at most a minute where things hang. Changes nothing, raises nothing."""
    topics = [topic for topic in _TOPICS if topic != "gpus" or subject.backend == "cuda"]
    return judge(read(subject, topics))


def why_no_driver(subject: Subject) -> str:
    """The failed findings on driver and rights, as lines; empty when none failed. Blocks like ``examine``."""
    return findings.as_text(findings.failed(judge(read(subject, _START))))


def read(subject: Subject, topics: list[str] | tuple[str, ...]) -> Readings:
    """Reads ``topics`` side by side. One that fails or takes too long is None, with the reason in ``unread``."""
    readers: dict[str, Callable[[], Any]] = {
        "gpus": read_gpus.read,
        "host": read_host.read,
        "disk": lambda: read_host.read_disk(subject),
        "criu": lambda: criu.find(subject.criu),
        "daemon": lambda: read_host.read_daemon(subject),
    }
    return gather(subject, {topic: (readers[topic], _TOPICS[topic][0]) for topic in topics})


def gather(subject: Subject, readers: Mapping[str, tuple[Callable[[], Any], float]]) -> Readings:
    """``readers``: topic -> how it is read, and for how many seconds at most."""
    begun = monotonic()
    threads = {topic: _Reading(topic, reader) for topic, (reader, _) in readers.items()}
    for thread in threads.values():
        thread.start()
    values: dict[str, Any] = {}
    unread: dict[str, str] = {}
    for topic, thread in threads.items():
        limit_s = readers[topic][1]
        thread.join(max(0.0, begun + limit_s - monotonic()))
        if thread.is_alive():
            unread[topic] = f"did not answer within {limit_s:g} s"
        elif thread.error is not None:
            unread[topic] = f"cannot be read: {thread.error!r}"
        else:
            values[topic] = thread.value
    return Readings(subject=subject, unread=unread, **values)


class _Reading(threading.Thread):
    """One topic. A daemon thread: what hangs must not keep the program from ending."""

    def __init__(self, topic: str, reader: Callable[[], Any]) -> None:
        super().__init__(name=f"doctor-{topic}", daemon=True)
        self._reader = reader
        self.value: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.value = self._reader()
        except Exception as error:  # noqa: BLE001 - an examination reports, whatever it meets
            self.error = error


def judge(readings: Readings) -> list[Finding]:
    """Pure: what follows from the readings, the GPU's first."""
    subject, gpus = readings.subject, readings.gpus
    vram = gpus.vram_bytes if gpus else 0
    largest = max((gpu.total_bytes for gpu in gpus.gpus), default=0) if gpus else 0
    found: list[Finding] = []
    if gpus is not None:
        found += judge_gpus.judge(gpus, readings.host, allow_old_driver=subject.allow_old_driver)
    if readings.host is not None:
        found += judge_host.judge(readings.host, vram, largest)
    if readings.disk is not None:
        found += judge_host.judge_disk(readings.disk, vram)
    if readings.criu is not None:
        found.append(judge_host.judge_criu(readings.criu, subject.criu))
    if readings.daemon is not None:
        found.append(judge_host.judge_daemon(readings.daemon, gpusched.__version__))
    for topic, reason in readings.unread.items():
        status = Status.FAIL if _TOPICS[topic][1] else Status.WARN
        fix = "look for what hangs: sudo dmesg | tail, and: ps -eo pid,stat,wchan,comm | grep ' D'"
        found.append(Finding(name=topic, status=status, found=reason, fix=fix))
    return found
