"""Time inside a process goes on from where it was: after hours on disk, in a copy, and in another boot.

CRIU gives what it brings back a time namespace; so these hold without any doing of ours, and must go on to hold.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import time

import msgspec
import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, wait_until
from disk_tier import images
from gpusched.mechanisms.criu import manifest
from gpusched.mechanisms.criu.checksums import sum_files
from workloads import done, entries

pytestmark = [pytest.mark.criu, pytest.mark.root]

#: Tells its clocks, as they are and in a wait with a deadline, which the kernel keeps by the clock itself.
TELLER = """
import threading, time
waiting = threading.Event()
while True:
    now = time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)
    print("clocks", *now, time.clock_gettime(time.CLOCK_REALTIME), flush=True)
    waiting.wait(0.05)
"""
#: What a restore on a busy machine may add, and what is slept on disk.
SOON_S = 3.5
DISK_S = 4.0
WEEKS_S = 4e6


def start(daemon: PrivateDaemon) -> None:
    done(daemon, "run", name="teller", cmd=[sys.executable, "-c", TELLER], log="teller")
    wait_until(lambda: len(told(daemon)) > 3, within_s=20, what="it tells its clocks")


def told(daemon: PrivateDaemon, name: str = "teller") -> list[tuple[float, float, float]]:
    path = daemon.log_dir / f"{name}.log"
    text = path.read_text() if path.exists() else ""
    found = re.findall(r"^clocks (\S+) (\S+) (\S+)$", text, re.M)
    return [(float(a), float(b), float(c)) for a, b, c in found]


def first_since(
    daemon: PrivateDaemon, before: int, name: str = "teller"
) -> tuple[float, float, float]:
    """It may have been about to tell what it had read before."""
    wait_until(lambda: len(told(daemon, name)) > before + 3, within_s=10, what="it tells on")
    return told(daemon, name)[before + 1]


@pytest.mark.slow
def test_time_on_disk_does_not_count_and_the_date_does(private_daemon: StartDaemon) -> None:
    daemon = private_daemon()
    start(daemon)
    began = time.monotonic()
    for _ in range(2):
        done(daemon, "hibernate", name="teller")
        last, count = told(daemon)[-1], len(told(daemon))
        time.sleep(DISK_S)
        done(daemon, "thaw", name="teller")
        came = first_since(daemon, count)
        for clock in (0, 1):
            assert 0 <= came[clock] - last[clock] < SOON_S
        assert came[2] - last[2] > DISK_S
    monotonic = [each[0] for each in told(daemon)]
    assert monotonic == sorted(monotonic)
    assert monotonic[-1] - monotonic[0] < time.monotonic() - began - DISK_S
    # Start times are told by the clocks of who asks: it is still known for what it is.
    daemon.restart()
    assert entries(daemon)["teller"]["state"] == "active"
    for method in ("freeze", "thaw", "kill"):
        done(daemon, method, name="teller")


def test_in_another_boot_its_clocks_go_on_from_where_they_were(private_daemon: StartDaemon) -> None:
    """As the image of a host that had been up for weeks: after a reboot the host's own clocks are behind."""
    daemon = private_daemon()
    start(daemon)
    done(daemon, "hibernate", name="teller")
    last, count = told(daemon)[-1], len(told(daemon))
    shift = WEEKS_S
    _pretend_uptime(daemon, shift)
    done(daemon, "thaw", name="teller")
    for _ in range(2):
        came = first_since(daemon, count)
        for clock in (0, 1):
            assert -1 <= came[clock] - last[clock] - shift < SOON_S
        done(daemon, "hibernate", name="teller")
        last, count = told(daemon)[-1], len(told(daemon))
        shift = 0.0
        done(daemon, "thaw", name="teller")


def _pretend_uptime(daemon: PrivateDaemon, shift_s: float) -> None:
    """Writes the image anew, as a host has it whose clocks said that much more."""
    (image,) = images(daemon)
    folder = daemon.state_dir / "images" / image
    (clocks,) = folder.rglob("timens-*.img")
    content = clocks.read_bytes()
    monotonic, boottime = (_seconds_at(content, at) for at in _clock_offsets(content))
    assert abs(monotonic - time.clock_gettime(time.CLOCK_MONOTONIC)) < 60
    made = b""
    for field, seconds in ((b"\x0a", monotonic + shift_s), (b"\x12", boottime + shift_s)):
        entry = b"\x08" + _varint(int(seconds)) + b"\x10" + _varint(0)
        made += field + _varint(len(entry)) + entry
    clocks.write_bytes(content[:_HEADER] + struct.pack("<I", len(made)) + made)
    about = manifest.decode((folder / "manifest").read_bytes())
    directory = os.open(folder, os.O_RDONLY)
    name = str(clocks.relative_to(folder))
    sums = {**about.files, **sum_files(directory, [name])}
    os.close(directory)
    (folder / "manifest").write_bytes(manifest.encode(msgspec.structs.replace(about, files=sums)))


#: CRIU's magic numbers, before the length of the message: two times (fields 1 and 2), each seconds and nanoseconds.
_HEADER = 8


def _clock_offsets(content: bytes) -> tuple[int, int]:
    """Where the two times begin."""
    first = _HEADER + 4
    assert content[first] == 0x0A
    second = first + 2 + content[first + 1]
    assert content[second] == 0x12
    return first + 2, second + 2


def _seconds_at(content: bytes, at: int) -> int:
    assert content[at] == 0x08
    value = shift = 0
    while True:
        at += 1
        value |= (content[at] & 0x7F) << shift
        shift += 7
        if content[at] < 0x80:
            return value


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def test_copies_have_the_time_of_their_original(private_daemon: StartDaemon) -> None:
    daemon = private_daemon()
    start(daemon)
    last = told(daemon)[-1]
    for name in done(daemon, "fork", name="teller", copies=2)["copies"]:
        came = first_since(daemon, 0, name)
        assert 0 <= came[0] - last[0] < SOON_S + 5
    original = [each[0] for each in told(daemon)]
    assert original == sorted(original)
