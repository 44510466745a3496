"""Where the pool lies and what it keeps; which processes get the library."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpusched import errors
from gpusched.engine.lifecycle import Lifecycle
from gpusched.mechanisms.cuda import pool, pool_home
from gpusched.mechanisms.cuda.pool import CHUNK_BYTES, Pool, spare_bytes
from gpusched.mechanisms.host import ProcHost
from gpusched.ports import User
from gpusched.protocol import messages
from gpusched.units import MIB

SOMEBODY = User(name="x", home="/x", shell="/bin/sh", groups=())


@pytest.mark.root
def test_a_root_daemon_gets_a_file_system_of_its_own_and_takes_it_away(tmp_path: Path) -> None:
    path = pool_home.prepare(tmp_path)
    if path != tmp_path / "pool":
        pytest.skip("root may not mount here")
    try:
        assert pool_home.prepare(tmp_path) == pool_home.place(tmp_path) == path
        assert path.stat().st_mode & 0o777 == 0o700
        chunks = Pool(path)
        chunks.take(os.getpid(), ticks(), [(0, "GPU-a", 2 * MIB)])
        pool_home.release(tmp_path)
        assert path.is_mount(), "somebody's contents are there"
        chunks.release(os.getpid(), ticks())
    finally:
        pool_home.release(tmp_path)
    assert not path.is_mount()


def ticks() -> int:
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])


def test_somebody_elses_directory_in_its_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_home, "_mount", lambda *_: False)
    monkeypatch.setattr(pool_home, "_SHM", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    pool_home.place(tmp_path).symlink_to("/etc")
    with pytest.raises(errors.Unavailable, match="remove it"):
        pool_home.prepare(tmp_path)


def test_what_a_pool_keeps_is_known_to_the_next_one_and_spare_chunks_are_not_kept(
    tmp_path: Path,
) -> None:
    first = Pool(tmp_path)
    kept = first.take(1, 2, [(0, "GPU-a", 2 * MIB), (4, "GPU-b", CHUNK_BYTES)])
    first.complete(kept)
    first.take(5, 6, [(0, "GPU-a", 2 * MIB)])
    first.release(5, 6)
    assert len(kept.chunks) == 2 and first.free_bytes == CHUNK_BYTES
    assert spare_bytes(tmp_path) == CHUNK_BYTES
    assert ProcHost(pool=tmp_path).ram().available_bytes > CHUNK_BYTES
    second = Pool(tmp_path)
    (found,) = second.snapshots()
    assert found.complete and (found.places, found.sizes) == (kept.places, kept.sizes)
    assert list(found.by_gpu()) == ["GPU-a", "GPU-b"]
    assert sum(s.size_bytes for s in found.by_gpu()["GPU-b"][4]) == CHUNK_BYTES
    assert {path.name for path in tmp_path.glob("chunk-*")} == set(kept.chunks)


def test_chunks_stay_where_it_cannot_be_read_whose_they_are(tmp_path: Path) -> None:
    first = Pool(tmp_path)
    first.complete(first.take(1, 2, [(0, "GPU-a", 2 * MIB)]))
    first.complete(first.take(3, 4, [(0, "GPU-a", 2 * MIB)]))
    other = tmp_path / "process-1-2.json"
    other.write_text(other.read_text().replace("{", '{"of_a_later_version": 7, ', 1))
    (tmp_path / "process-3-4.json").write_text('{"of": "another version"}')
    second = Pool(tmp_path)
    assert [found.pid for found in second.snapshots()] == [1]
    assert len(list(tmp_path.glob("chunk-*"))) == 2
    assert second.take(5, 6, [(0, "GPU-a", 2 * MIB)]).chunks == ("chunk-3",)


def test_a_pool_that_is_only_looked_at_is_left_as_it_is(tmp_path: Path) -> None:
    owner = Pool(tmp_path)
    owner.take(1, 2, [(0, "GPU-a", 2 * MIB)])
    owner.release(1, 2)
    Pool(tmp_path, of_another=True)
    assert len(list(tmp_path.glob("chunk-*"))) == 1


def test_what_does_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_available_bytes", lambda: 2048 * MIB)
    with pytest.raises(errors.InsufficientHostMemory, match=r"need 2\.0 GiB more .* 1\.0 GiB may"):
        Pool(tmp_path).take(1, 2, [(0, "GPU-a", 4 * CHUNK_BYTES)])
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ({}, ("GPU-a",), "/lib/direct.so"),
        ({"LD_PRELOAD": "/lib/mine.so"}, ("GPU-a",), "/lib/direct.so:/lib/mine.so"),
        ({}, ("GPU-a", "GPU-b"), None),
        ({"GPUSCHED_DIRECT": "1"}, ("GPU-a", "GPU-b"), "/lib/direct.so"),
        ({"LD_PRELOAD": "/lib/mine.so"}, ("GPU-a", "GPU-b"), "/lib/mine.so"),
        ({"LD_PRELOAD": "/lib/direct.so"}, ("GPU-a", "GPU-b"), None),
        ({"LD_PRELOAD": "/lib/direct.so:/lib/mine.so"}, ("GPU-a", "GPU-b"), "/lib/mine.so"),
        ({"LD_PRELOAD": "/lib/direct.so"}, ("GPU-a",), "/lib/direct.so"),
    ],
)
def test_who_has_one_gpu_or_wants_it_gets_the_library(
    given: dict[str, str], gpus: tuple[str, ...], expected: str | None
) -> None:
    limits = SimpleNamespace(default_env={}, forced_env={}, preload="/lib/direct.so")
    lifecycle: Any = SimpleNamespace(_core=SimpleNamespace(limits=limits))
    params = messages.Run(name="a", cmd=["true"], env=given)
    made = Lifecycle._environment(cast("Lifecycle", lifecycle), params, SOMEBODY, gpus)
    assert made.get("LD_PRELOAD") == expected
