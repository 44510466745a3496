"""What systemd is told: that the daemon serves, and that it is about to end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import StartDaemon
from daemons import request
from gpusched.mechanisms.notify import notify


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A datagram socket where systemd's would be, at ``tmp_path/notify``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(20)
        yield receiver


def test_the_daemon_says_when_it_serves_and_when_it_begins_to_end(
    manager: socket.socket, private_daemon: StartDaemon
) -> None:
    daemon = private_daemon(vram="64M", env={"NOTIFY_SOCKET": manager.getsockname()})
    assert manager.recv(100) == b"READY=1"
    assert request(daemon.socket, "status")["ok"]

    # What is managed must not speak for the daemon.
    answer = request(daemon.socket, "run", name="child", cmd=["env"])
    assert answer["ok"], answer
    with daemon.client().follow_logs("child") as lines:
        variables = list(lines)
    assert any(line.startswith("GPUSCHED_MANAGED=") for line in variables)
    assert not any(line.startswith("NOTIFY_SOCKET") for line in variables)

    daemon.client().kill("child")
    assert daemon.stop() == 0
    assert manager.recv(100) == b"STOPPING=1"


def test_a_name_in_the_abstract_namespace_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")  # the kernel chooses an abstract name
        receiver.settimeout(5)
        name = receiver.getsockname().decode()
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name[1:]}")
        notify("READY=1")
        assert receiver.recv(100) == b"READY=1"


def test_a_manager_that_is_gone_is_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING):
        notify("READY=1")
    assert "state=READY=1" in caplog.text
