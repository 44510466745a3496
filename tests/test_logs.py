"""Logs that managed processes write themselves: the end of one, what comes after it, and hostile owners."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import PrivateDaemon, wait_until
from gpusched.mechanisms.logs import BLOCK_BYTES, MAX_BYTES, MAX_LINE_BYTES
from live import Line, ask, error_of, running, state, wait_state


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with running() as daemon:
        yield daemon


@pytest.fixture
def job(daemon: PrivateDaemon) -> Iterator[str]:
    yield "job"
    for name in [p["name"] for p in ask(daemon, "status")["processes"]]:
        ask(daemon, "kill", name=name)


def write(daemon: PrivateDaemon, script: str) -> None:
    """Runs a shell script to its end."""
    ask(daemon, "run", name="job", cmd=["sh", "-c", script])
    wait_state(daemon, "job", "dead")


def tail(daemon: PrivateDaemon, lines: int) -> list[str]:
    result = ask(daemon, "logs", name="job", lines=lines)
    assert result["output"] == "\n".join(result["lines"])
    return list(result["lines"])


def test_the_last_lines(daemon: PrivateDaemon, job: str) -> None:
    write(daemon, "seq 100000; echo err >&2; printf 'no newline'")
    assert tail(daemon, 3) == ["100000", "err", "no newline"]
    assert len(tail(daemon, 0)) == 50
    assert tail(daemon, -1) == [*map(str, range(1, 100_001)), "err", "no newline"]
    assert tail(daemon, 20_000)[0] == str(100_002 - 20_000 + 1)


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        ("true", []),
        ("echo", [""]),
        ("echo; echo", ["", ""]),
        ("printf a", ["a"]),
        (r"printf 'a\r\nb\0c\n'", ["a\r", "b\0c"]),
        (r"printf '\377\303\n\303\244\n'", ["��", "ä"]),
        (r"printf 'a\302\205b\342\200\250c\n'", ["a\x85b\u2028c"]),
    ],
)
def test_odd_contents(daemon: PrivateDaemon, job: str, script: str, lines: list[str]) -> None:
    write(daemon, script)
    for count in (1000, -1):
        assert tail(daemon, count) == lines


def test_lines_around_the_size_of_a_block(daemon: PrivateDaemon, job: str) -> None:
    path = daemon.log_dir / "job.log"
    write(daemon, "true")
    for size in (BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES):
        path.write_bytes(b"first\n" + b"x" * size + b"\nlast\n")
        assert tail(daemon, 1) == ["last"]
        assert [len(line) for line in tail(daemon, 2)] == [size, 4]
        assert [len(line) for line in tail(daemon, 3)] == [5, size, 4]


def test_a_huge_log_and_a_huge_line_are_cut(daemon: PrivateDaemon, job: str) -> None:
    path = daemon.log_dir / "job.log"
    write(daemon, "true")
    path.write_bytes(b"x" * (MAX_BYTES + 10 * BLOCK_BYTES))
    assert [len(line) for line in tail(daemon, 1)] == [MAX_BYTES]
    path.write_bytes(b"x" * MAX_BYTES + b"\n" + b"short\n" * 5)
    assert tail(daemon, -1)[-5:] == ["short"] * 5
    assert tail(daemon, 2) == ["short"] * 2
    line = b"0123456789abcde\n"
    path.write_bytes(line * (2 * MAX_BYTES // len(line)))
    found = tail(daemon, -1)
    assert set(found) == {line.decode().strip()}  # whole lines only
    assert len(found) == MAX_BYTES // len(line) - 1


def test_following_gives_every_line_once_and_ends_with_the_process(
    daemon: PrivateDaemon, job: str, tmp_path: Path
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    script = f"echo one; printf tw; read _ < {fifo}; echo o; seq 3 2000; printf end"
    ask(daemon, "run", name="job", cmd=["sh", "-c", script])
    wait_until(lambda: tail(daemon, 5) == ["one", "tw"], within_s=10, what="the beginning")
    with Line(daemon.socket) as line:
        line.send({"method": "logs", "params": {"name": "job", "follow": True}, "id": 1})
        opening = line.read()
        assert opening["result"]["lines"] == ["one"]  # the second is not written yet
        assert opening["id"] == 1
        fifo.write_text("go\n")
        found = [line.read() for _ in range(2000)]
        assert [item["line"] for item in found] == ["two", *map(str, range(3, 2001)), "end"]
        assert line.is_closed()


def test_a_line_without_end_is_followed_in_pieces(
    daemon: PrivateDaemon, job: str, tmp_path: Path
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    size = 3 * MAX_LINE_BYTES + 5
    script = f"read _ < {fifo}; head -c {size} /dev/zero | tr '\\0' x; exec sleep 0.2"
    ask(daemon, "run", name="job", cmd=["sh", "-c", script])
    with Line(daemon.socket) as line:
        line.send({"method": "logs", "params": {"name": "job", "follow": True}})
        assert line.read()["result"]["lines"] == []
        fifo.write_text("go\n")
        pieces: list[int] = []
        while sum(pieces) < size:
            pieces.append(len(line.read()["line"]))
        assert sum(pieces) == size and len(pieces) > 2
        assert line.is_closed()


def test_followers_do_not_keep_others_waiting(daemon: PrivateDaemon, job: str) -> None:
    ask(daemon, "run", name="job", cmd=["sh", "-c", "while :; do seq 100; sleep 0.05; done"])
    stop = threading.Event()

    def read(line: Line) -> None:
        while not stop.is_set():
            assert line.read()["line"]

    lines = [Line(daemon.socket) for _ in range(5)]
    for line in lines:
        line.send({"method": "logs", "params": {"name": "job", "follow": True}})
        assert line.read()["ok"]
    readers = [threading.Thread(target=read, args=(line,)) for line in lines]
    for reader in readers:
        reader.start()
    for _ in range(100):
        assert state(daemon, "job") == "active"
    stop.set()
    for reader in readers:
        reader.join()
    for line in lines:
        line.close()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "hard link", "other owner", "gone"])
@pytest.mark.root
def test_what_is_not_the_log_any_more_is_refused(
    daemon: PrivateDaemon, job: str, tmp_path: Path, kind: str
) -> None:
    """A log directory that its users may write to is a mistake, but not one that lets them read others' files."""
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    path = daemon.log_dir / "job.log"
    write(daemon, "echo mine")
    path.unlink()
    match kind:
        case "link":
            path.symlink_to(secret)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "hard link":
            os.chown(secret, 65534, 65534)
            path.hardlink_to(secret)
        case "other owner":
            path.write_text("secret\n")
            os.chown(path, 65534, 65534)
        case _:
            assert kind == "gone"
    answer = error_of(daemon, "logs", name="job")
    assert answer["code"] == ("not_found" if kind == "gone" else "permission_denied"), answer
    with Line(daemon.socket) as line:
        line.send({"method": "logs", "params": {"name": "job", "follow": True}})
        assert not line.read()["ok"]
    assert "secret" not in str(answer)
    if kind == "directory":
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
