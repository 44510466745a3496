"""An image that this machine does not fit any more: what changed is named, nothing is tried, the image is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from daemons import PrivateDaemon, request
from disk_tier import images, require_beating, start_rich, wait_no_image
from gpusched.mechanisms import proc
from gpusched.mechanisms.criu import manifest
from live import ALICE, ask_as, others_workload, running, wait_ready
from workloads import Workload, done, entries, refused

pytestmark = [pytest.mark.criu, pytest.mark.root]


@pytest.fixture(scope="module")
def shared() -> Iterator[PrivateDaemon]:
    with running() as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: PrivateDaemon) -> Iterator[PrivateDaemon]:
    yield shared
    for name in entries(shared):
        request(shared.socket, "kill", name=name, force=True)
    wait_no_image(shared)


def refused_and_kept(daemon: PrivateDaemon, name: str) -> str:
    """The refusal of a thaw; the process is on disk as before, and nothing of it was started."""
    (image,) = images(daemon)
    answer = refused(daemon, "unsupported", "thaw", name=name)
    assert entries(daemon)[name]["state"] == "hibernated"
    assert images(daemon) == [image]
    assert not list((daemon.state_dir / "trees").iterdir())
    return str(answer["error"])


def test_an_open_file_that_was_written_meanwhile(daemon: PrivateDaemon) -> None:
    data = daemon.directory / "data"
    start_rich(daemon, "rich", str(data))
    require_beating(daemon, "rich")
    done(daemon, "hibernate", name="rich")
    before = data.read_bytes()
    data.write_bytes(before + b"more")
    assert f"{data} is another file" in refused_and_kept(daemon, "rich")
    data.unlink()
    assert f"{data} is gone" in refused_and_kept(daemon, "rich")


def test_a_program_that_was_replaced(daemon: PrivateDaemon) -> None:
    program = daemon.directory / "program"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    done(daemon, "run", name="p", cmd=[str(program), "1000"])
    done(daemon, "hibernate", name="p")
    moved = program.rename(daemon.directory / "moved")
    assert f"{program} is gone" in refused_and_kept(daemon, "p")
    moved.rename(program)
    done(daemon, "thaw", name="p")
    assert entries(daemon)["p"]["state"] == "active"


def test_other_simulated_gpus_are_a_change_and_the_image_waits_for_the_old_ones(
    daemon: PrivateDaemon,
) -> None:
    model = Workload.start(daemon, "model", "8M")
    done(daemon, "hibernate", name="model")
    (image,) = images(daemon)
    path = daemon.state_dir / "images" / image / "manifest"
    _pretend_driver(path, "simulated-of-old")
    assert "simulated-of-old" in refused_and_kept(daemon, "model")
    _pretend_driver(path, "simulated")
    done(daemon, "thaw", name="model")
    assert model.digest


def _pretend_driver(path: Path, version: str) -> None:
    """Writes the manifest anew, as an image of another driver's has it."""
    about = manifest.decode(path.read_bytes())
    machine = msgspec.structs.replace(about.machine, driver_version=version)
    path.write_bytes(manifest.encode(msgspec.structs.replace(about, machine=machine)))


def test_an_ordinary_users_image_comes_back_as_that_user(daemon: PrivateDaemon) -> None:
    answer = ask_as(ALICE, daemon.socket, "run", name="alices", **others_workload("4M"))
    assert answer["ok"], answer
    wait_ready(daemon, "alices")
    answer = ask_as(ALICE, daemon.socket, "hibernate", name="alices")
    if not proc.has_capability(24):
        assert answer["code"] == "unsupported" and "SYS_RESOURCE" in answer["error"]
        assert entries(daemon)["alices"]["state"] == "active"
        pytest.skip(
            "root lacks CAP_SYS_RESOURCE here, and without it only its own processes can be saved"
        )
    assert answer["ok"], answer
    folder = daemon.state_dir / "images"
    for each in (folder, *folder.rglob("*")):
        about = each.lstat()
        assert about.st_uid == 0 or "kept" in each.parts, each
        assert about.st_mode & 0o077 == 0 or "kept" in each.parts, each
    answer = ask_as(ALICE, daemon.socket, "thaw", name="alices")
    assert answer["ok"], answer
    pid = entries(daemon)["alices"]["pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
    assert set(uids) == {str(ALICE)}
