"""Memory of the host, and what a process's control group leaves of it."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from daemons import wait_until
from gpusched.mechanisms import cgroups
from gpusched.mechanisms.host import ProcHost
from gpusched.units import GIB, MIB


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_the_memory_of_the_host_is_what_others_say_it_is() -> None:
    ours, theirs = ProcHost().ram(), psutil.virtual_memory()
    assert ours.total_bytes == theirs.total
    assert abs(ours.available_bytes - theirs.available) < theirs.total / 20


# -- a real memory controller ---------------------------------------------------------------------


def memory_hierarchy() -> tuple[Path, str] | None:
    """Where groups with a memory limit can be made, and the name of the limit's file."""
    for mount in cgroups.mounts():
        if mount.fstype == "cgroup" and "memory" in mount.options:
            return mount.point, "memory.limit_in_bytes"
        control = mount.point / "cgroup.subtree_control"
        if mount.fstype == "cgroup2" and "memory" in control.read_text().split():
            return mount.point, "memory.max"
    return None


@pytest.mark.root
def test_the_tightest_limit_above_a_process_counts(sleeper: subprocess.Popen[bytes]) -> None:
    hierarchy = memory_hierarchy()
    if hierarchy is None:
        pytest.skip("needs a memory controller")
    point, limit = hierarchy
    outer = point / f"gpusched-test-{uuid.uuid4().hex}"
    inner = outer / "inner"
    try:
        try:
            outer.mkdir()
            if limit == "memory.max":
                (outer / "cgroup.subtree_control").write_text("+memory")
            inner.mkdir()
        except OSError as error:
            pytest.skip(f"needs control groups that may be written: {error}")
        (inner / "cgroup.procs").write_text(str(sleeper.pid))
        host = ProcHost()
        (inner / limit).write_text(str(4 * GIB))
        room = host.cgroup_room_bytes(sleeper.pid)
        assert room is not None
        assert 4 * GIB - 64 * MIB < room <= 4 * GIB
        (outer / limit).write_text(str(2 * GIB))
        room = host.cgroup_room_bytes(sleeper.pid)
        assert room is not None
        assert 2 * GIB - 64 * MIB < room <= 2 * GIB
    finally:
        sleeper.kill()
        sleeper.wait()
        for group in (inner, outer):
            if group.exists():
                wait_until(partial(remove, group), within_s=5, what=f"{group} is removed")


def remove(group: Path) -> bool:
    cgroups.remove(group)
    return not group.exists()


# -- both versions, from files --------------------------------------------------------------------


class Files:
    """A /proc and a control group hierarchy made of plain files."""

    def __init__(self, directory: Path) -> None:
        self.proc = directory / "proc"
        self.point = directory / "cgroup point"
        (self.proc / "self").mkdir(parents=True)
        self.point.mkdir()

    def mount(self, fstype: str, options: str, root: str = "/") -> None:
        point = str(self.point).replace(" ", "\\040")
        (self.proc / "self" / "mountinfo").write_text(
            "21 1 254:0 / / rw,relatime - ext4 /dev/root rw\n"
            f"41 31 0:38 {root} {point} rw,nosuid shared:9 - {fstype} none rw,{options}\n"
        )

    def process(self, pid: int, *lines: str) -> None:
        (self.proc / str(pid)).mkdir()
        (self.proc / str(pid) / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def group(self, path: str, **files: int | str) -> None:
        directory = self.point / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name.replace("__", ".")).write_text(f"{content}\n")

    def room(self, pid: int) -> int | None:
        return ProcHost(self.proc).cgroup_room_bytes(pid)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_version_2(files: Files) -> None:
    files.mount("cgroup2", "nsdelegate")
    files.process(7, "0::/a/b")
    assert files.room(7) is None, "no memory controller"
    files.group("a", memory__max="max", memory__high="max", memory__current=300)
    files.group("a/b", memory__max=1000, memory__high="max", memory__current=300)
    assert files.room(7) == 700
    files.group("a/b", memory__stat="anon 100\ninactive_file 200\nactive_file 50")
    assert files.room(7) == 900, "page cache can be dropped"
    files.group("a", memory__max=950)
    assert files.room(7) == 650, "the outer group is tighter"
    files.group("a/b", memory__high=400)
    assert files.room(7) == 300, "above memory.high a process is throttled"
    files.group("a/b", memory__current=5000)
    assert files.room(7) == 0


def test_version_1(files: Files) -> None:
    files.mount("cgroup", "memory")
    files.process(7, "4:memory:/a", "1:name=systemd:/elsewhere", "0::/")
    files.group("a", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=300)
    assert files.room(7) is None
    files.group(
        "a", memory__limit_in_bytes=1000, memory__stat="inactive_file 9\ntotal_inactive_file 100"
    )
    assert files.room(7) == 800


def test_inside_a_container_the_mount_shows_a_part_of_the_hierarchy(files: Files) -> None:
    files.mount("cgroup2", "nsdelegate", root="/docker/123")
    files.group("", memory__max=1000, memory__current=100)
    files.process(7, "0::/docker/123")
    files.process(8, "0::/docker/123/sub")
    files.process(9, "0::/docker/1234")
    files.process(10, "0::/../elsewhere")
    assert files.room(7) == 900
    assert files.room(8) == 900
    assert files.room(9) is None, "outside of what we see"
    assert files.room(10) is None


def test_a_process_that_is_gone_has_no_limit(files: Files) -> None:
    files.mount("cgroup2", "nsdelegate")
    assert files.room(7) is None
