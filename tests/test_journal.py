"""The journal keeps whole records or none: torn, damaged, on a full disk, and with many writers at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched import errors
from gpusched.mechanisms.journal import (
    FileJournal,
    JournalUnreadable,
    decode_records,
    encode_record,
    read,
)

HEADER = {"v": 1, "backend": "sim"}
RECORDS: list[dict[str, Any]] = [
    HEADER,
    {"proc": {"name": "a", "text": "a\nline \u20ac"}},
    {"op": {"op_id": "op-1", "off": ["t"]}},
    {"op_end": "op-1"},
]
BYTES = b"".join(encode_record(record) for record in RECORDS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def opened(path: Path, *records: dict[str, Any]) -> FileJournal:
    journal = FileJournal(path, "sim")
    asyncio.run(journal.rewrite(records))
    return journal


# -- reading --------------------------------------------------------------------------------------


def test_what_was_written_is_read(path: Path) -> None:
    assert read(path) == []
    journal = opened(path, {"n": 0})

    async def write() -> None:
        await journal.append({"n": 1}, {"n": 2})
        await journal.append({"n": 3})

    asyncio.run(write())
    assert read(path) == [HEADER, *({"n": n} for n in range(4))]
    assert path.stat().st_size == journal.size_bytes
    assert path.stat().st_mode & 0o777 == 0o600
    journal.close()


def test_torn_at_any_byte_the_whole_records_before_are_read(path: Path) -> None:
    ends = [0]
    for record in RECORDS:
        ends.append(ends[-1] + len(encode_record(record)))
    for length in range(len(BYTES) + 1):
        path.write_bytes(BYTES[:length])
        whole = sum(end <= length for end in ends[1:])
        if length and not whole:
            with pytest.raises(JournalUnreadable, match="no readable header"):
                read(path)
        else:
            assert read(path) == RECORDS[:whole], f"torn after {length} bytes"


def test_a_damaged_byte_never_changes_what_is_read() -> None:
    """Whatever byte it is, and whatever it becomes: the same records, fewer from the end, or none at all."""
    last = len(BYTES) - len(encode_record(RECORDS[-1]))
    for position in range(len(BYTES)):
        for change in (0x01, 0x20, 0x80, BYTES[position], BYTES[position] ^ ord("\n")):
            damaged = bytearray(BYTES)
            damaged[position] ^= change
            try:
                found = decode_records(bytes(damaged))
            except JournalUnreadable:
                continue
            lost = 0 if found == RECORDS else 2 if position == last - 1 else 1
            assert found == RECORDS[: len(RECORDS) - lost], f"byte {position} ^ {change:#x}"
            assert (
                not lost or position >= last - 1
            )  # the line break before the last record, or that itself


@given(data=st.binary(max_size=200))
def test_any_bytes_at_all_are_records_or_unreadable(data: bytes) -> None:
    try:
        found = decode_records(data)
    except JournalUnreadable:
        return
    assert found == [] or data.startswith(b"%08x " % int(data[:8], 16))


def test_zeros_where_a_record_should_be_make_it_unreadable() -> None:
    """A file that grew and was never filled: what a power failure can leave."""
    first = len(encode_record(HEADER))
    with pytest.raises(JournalUnreadable, match="line 2 is damaged"):
        decode_records(BYTES[:first] + bytes(80) + b"\n" + BYTES[first:])


def test_another_version_is_unreadable(path: Path) -> None:
    path.write_bytes(encode_record({"v": 2, "backend": "sim"}))
    with pytest.raises(JournalUnreadable, match="version 2"):
        read(path)


# -- writing --------------------------------------------------------------------------------------


def test_records_that_wait_together_share_one_sync(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(path)
    syncs = 0
    real = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)

    async def write() -> None:
        await asyncio.gather(*(journal.append({"n": n}) for n in range(200)))

    asyncio.run(write())
    journal.close()
    assert read(path)[1:] == [{"n": n} for n in range(200)]
    assert syncs <= 3  # the first alone, the rest together


def test_a_rewrite_and_appends_keep_their_order(path: Path) -> None:
    journal = opened(path, {"n": "old"})

    async def write() -> None:
        await asyncio.gather(
            journal.append({"n": "before"}),
            journal.rewrite([{"n": "new"}]),
            journal.append({"n": 1}),
            journal.append({"n": 2}),
            journal.rewrite([{"n": "newer"}]),
            journal.append({"n": 3}),
        )

    asyncio.run(write())
    journal.close()
    assert read(path) == [HEADER, {"n": "newer"}, {"n": 3}]
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_is_cancelled_takes_nobody_with_it(path: Path) -> None:
    journal = opened(path)

    async def write() -> None:
        async with asyncio.TaskGroup() as tasks:
            gone = tasks.create_task(journal.append({"n": 0}))
            tasks.create_task(journal.append({"n": 1}))
            await asyncio.sleep(0)
            gone.cancel()

    asyncio.run(write())
    journal.close()
    assert {"n": 1} in read(path)


def test_what_a_failed_write_left_is_gone_before_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a record reached the file, and the disk did not even let it be cut off again."""
    journal = opened(path, {"n": 0})

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        patch.setattr(os, "ftruncate", broken)
        with pytest.raises(errors.InsufficientDisk, match="Input/output error"):
            asyncio.run(journal.append({"n": "never recorded"}))
    asyncio.run(journal.append({"n": 1}))
    journal.close()
    assert read(path) == [HEADER, {"n": 0}, {"n": 1}]


@pytest.mark.parametrize("call", ["open_directory", "fsync_file", "fsync_directory", "rename"])
def test_after_a_rewrite_that_failed_anywhere_appends_reach_the_journal(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    journal = opened(path, {"n": 0})
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        _break(patch, call)
        with pytest.raises(errors.InsufficientDisk):
            asyncio.run(journal.rewrite([{"n": "new"}]))
    asyncio.run(journal.append({"n": 1}))
    assert read(path)[-1] == {"n": 1}
    assert [p.name for p in path.parent.iterdir()] == ["journal"]
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    journal.close()


def _break(patch: pytest.MonkeyPatch, call: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(24, os.strerror(24))

    real_open, real_fsync = os.open, os.fsync

    def open_files_only(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECTORY:
            fails()
        return real_open(name, flags, *rest, **more)

    def fsync_some(fd: int) -> None:
        is_directory = not Path(f"/proc/self/fd/{fd}").readlink().name.startswith("journal")
        if is_directory is (call == "fsync_directory"):
            fails()
        real_fsync(fd)

    match call:
        case "open_directory":
            patch.setattr(os, "open", open_files_only)
        case "rename":
            patch.setattr(Path, "rename", fails)
            patch.setattr(os, "rename", fails)
        case _:
            patch.setattr(os, "fsync", fsync_some)


# -- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Takes every block that is left."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return path


def wholly(call: Callable[[], Any]) -> errors.InsufficientDisk:
    with pytest.raises(errors.InsufficientDisk) as raised:
        call()
    return raised.value


@pytest.mark.root
def test_on_a_full_disk_nothing_is_recorded_and_nothing_is_lost(small_disk: Path) -> None:
    path = small_disk / "journal"
    journal = opened(path, {"n": 0})
    filler = fill(small_disk)
    big = {"text": "x" * 6000}  # does not fit into what is left of the last block
    failure = wholly(lambda: asyncio.run(journal.append({"n": "lost"}, big)))
    assert "No space left on device" in failure.message
    assert "Nothing was changed" in failure.message
    assert read(path) == [HEADER, {"n": 0}]
    asyncio.run(journal.append({"n": 1}))  # this one fits
    wholly(lambda: asyncio.run(journal.append(big)))
    filler.unlink()
    asyncio.run(journal.append(big))
    journal.close()
    assert read(path) == [HEADER, {"n": 0}, {"n": 1}, big]


@pytest.mark.root
def test_a_rewrite_that_does_not_fit_leaves_the_old_journal_and_no_litter(
    small_disk: Path,
) -> None:
    path = small_disk / "journal"
    journal = opened(path, {"n": 0})
    filler = fill(small_disk)
    wholly(lambda: asyncio.run(journal.rewrite([{"text": "x" * 9000}])))
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "journal"]
    asyncio.run(journal.append({"n": 1}))
    assert read(path) == [HEADER, {"n": 0}, {"n": 1}]
    filler.unlink()
    asyncio.run(journal.rewrite([{"n": 2}]))
    journal.close()
    assert read(path) == [HEADER, {"n": 2}]
