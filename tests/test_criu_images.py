"""The store of images: whole or not there, refused when damaged, and what must be unchanged when one comes back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpusched import errors
from gpusched.mechanisms.criu import checksums, manifest, run, system
from gpusched.mechanisms.criu.checksums import PIECE_BYTES, Damaged, Follower
from gpusched.mechanisms.criu.image import About
from gpusched.mechanisms.criu.images import ImageStore
from gpusched.mechanisms.criu.inside import Inside
from gpusched.mechanisms.criu.manifest import Gpu, Machine, Manifest, Stamp, UsedFile
from gpusched.mechanisms.criu.program import Program
from gpusched.ports import Description
from isolated import counting, isolated, save

MACHINE = Machine(
    boot_id="b",
    kernel="6.18.1",
    cpu_flags=("avx", "sse"),
    criu_version=(4, 2, 1),
    driver_version="580.1",
    gpus=(Gpu(uuid="GPU-1", name="H100"),),
)
ABOUT = About(
    name="job", uid=0, created_unix_s=1.5, machine=MACHINE, record={"argv": ["x"], "n": 1}
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    store = ImageStore(tmp_path / "images")
    yield store
    store.close()


def write(
    store: ImageStore, image_id: str = "a", size: int = 3 * PIECE_BYTES + 5, **more: Any
) -> Manifest:
    """An image of a large and a small file."""
    with store.begin(image_id) as draft:
        directory = store.root / f"{image_id}.tmp"
        (directory / "criu" / "pages-1.img").write_bytes(os.urandom(size))
        (directory / "criu" / "core-1.img").write_bytes(b"core")
        return draft.commit(replace(ABOUT, **more))


# -- whole or not there ---------------------------------------------------------------------------


def test_an_image_is_there_after_its_commit_and_says_what_it_is(store: ImageStore) -> None:
    assert store.images() == []
    made = write(store)
    assert sorted(made.files) == ["criu/core-1.img", "criu/pages-1.img"]
    assert made.size_bytes == 3 * PIECE_BYTES + 9
    (listed,) = store.images()
    assert (listed.image_id, listed.problem, listed.manifest) == ("a", "", made)
    assert made.size_bytes < listed.disk_bytes < made.size_bytes + 100_000
    assert store.used_bytes() == listed.disk_bytes
    with store.open("a") as image:
        assert image.manifest.record == {"argv": ["x"], "n": 1}
        image.verify()
        with image.verifying():
            pass
    assert store.root.stat().st_mode & 0o7777 == 0o700
    assert (store.root / "a/manifest").stat().st_mode & 0o777 == 0o600
    assert store.free_bytes() > 0


def test_until_the_commit_there_is_no_image_and_nothing_stays_of_a_failed_one(
    store: ImageStore,
) -> None:
    with pytest.raises(ZeroDivisionError), store.begin("a") as draft:
        assert store.images() == []
        with pytest.raises(errors.NotFound):
            store.open("a")
        with pytest.raises(errors.AlreadyExists, match="being written"):
            store.begin("a")
        os.close(os.open("part", os.O_CREAT, dir_fd=draft.fd))
        raise ZeroDivisionError
    assert list(store.root.iterdir()) == []
    write(store)
    with pytest.raises(errors.AlreadyExists, match="image a exists"):
        store.begin("a")


@pytest.mark.parametrize("failing", range(6))
def test_a_disk_that_fails_at_any_step_of_a_commit_leaves_no_image(
    failing: int, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    real = os.fsync

    def fsync(fd: int) -> None:
        if next(calls) == failing:
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(errors.Unavailable, match="Input/output error"):
        write(store, size=10)
    assert next(calls) > failing
    assert list(store.root.iterdir()) == []


def test_a_commit_makes_everything_durable_before_its_name(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{fd}").readlink()).removeprefix(f"{store.root}"))
        real_fsync(fd)

    def rename(*args: Any, **more: Any) -> None:
        done.append("rename")
        real_rename(*args, **more)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write(store, size=10)
    assert set(done[:2]) == {"/a.tmp/criu/core-1.img", "/a.tmp/criu/pages-1.img"}
    assert done[2:] == ["/a.tmp/criu", "/a.tmp/manifest", "/a.tmp", "rename", ""]


def test_a_full_disk_refuses_the_commit_with_the_numbers(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=700", "tmpfs", disk], check=True)
    try:
        store = ImageStore(disk)
        with (
            pytest.raises(errors.InsufficientDisk, match="is full") as failed,
            store.begin("a") as draft,
        ):
            (disk / "a.tmp/criu/core-1.img").write_bytes(bytes((1 << 20) - 8192))
            draft.commit(replace(ABOUT, record={"large": "x" * (1 << 20)}))
        assert failed.value.details["free_bytes"] < 1 << 20
        assert list(disk.iterdir()) == []
        store.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_garbage_is_collected_and_images_are_kept(store: ImageStore) -> None:
    write(store, "kept")
    for name in ("a.tmp", "b.gone"):
        (store.root / name / "criu").mkdir(parents=True)
        (store.root / name / "criu/pages-1.img").write_text("x")
    assert sorted(store.collect()) == ["a.tmp", "b.gone"]
    assert [one.image_id for one in store.images()] == ["kept"]
    store.delete("kept")
    assert list(store.root.iterdir()) == []
    with pytest.raises(errors.NotFound, match="there is no image kept"):
        store.delete("kept")


def test_an_open_image_can_be_read_while_it_is_deleted(store: ImageStore) -> None:
    write(store)
    with store.open("a") as image:
        fd = image.open_criu()
        store.delete("a")
        os.close(fd)
        with pytest.raises(errors.CriuError, match="missing"):
            image.verify()


# -- who may and what is followed -----------------------------------------------------------------


@pytest.mark.parametrize(
    "image_id", ["", ".", "..", "a/b", "../a", "a.tmp", "/etc", "-a", "a\n", "a" * 81, "ä", "a\0b"]
)
def test_an_id_is_never_a_path(image_id: str, store: ImageStore) -> None:
    calls: tuple[Callable[[str], object], ...] = (store.begin, store.open, store.delete)
    for call in calls:
        with pytest.raises(errors.InvalidRequest, match="cannot be the id"):
            call(image_id)


def test_symbolic_links_are_not_followed(tmp_path: Path, store: ImageStore) -> None:
    write(store, "real")
    (tmp_path / "link").symlink_to(store.root)
    with pytest.raises(errors.Unavailable):
        ImageStore(tmp_path / "link")
    (store.root / "a").symlink_to(store.root / "real")
    with pytest.raises(errors.NotFound):
        store.open("a")
    assert [one.image_id for one in store.images()] == ["real"]
    (store.root / "b.tmp").symlink_to(tmp_path)
    with pytest.raises(errors.GpuschedError):
        store.begin("b")
    (tmp_path / "images/real/criu/core-1.img").unlink()
    (tmp_path / "images/real/criu/core-1.img").symlink_to("/etc/passwd")
    with store.open("real") as image, pytest.raises(errors.CriuError):
        image.verify()


def test_a_directory_that_is_not_the_daemons_own_is_refused_and_left_as_it_is(
    tmp_path: Path,
) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    (tmp_path / "shared" / "work").write_text("")
    with pytest.raises(errors.PermissionDenied, match="mode 0755"):
        ImageStore(tmp_path / "shared")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.Unavailable, match="choose another with --disk-dir"):
        ImageStore(tmp_path / "file")
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        with pytest.raises(errors.PermissionDenied, match="uid 65534"):
            ImageStore(tmp_path / "theirs")


# -- damage ---------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (
        lambda a: flip(a / "criu/pages-1.img", PIECE_BYTES + 77),
        f"pages-1.img: the 8 MiB at offset {PIECE_BYTES} are not what was written",
    ),
    "the last byte": (lambda a: flip(a / "criu/pages-1.img", 3 * PIECE_BYTES + 4), "are not what"),
    "truncated": (lambda a: os.truncate(a / "criu/pages-1.img", 100), "has 100 bytes and should"),
    "longer": (
        lambda a: os.truncate(a / "criu/core-1.img", 100),
        "has 100 bytes and should have 4",
    ),
    "missing": (lambda a: (a / "criu/core-1.img").unlink(), "criu/core-1.img is missing"),
    "small": (lambda a: flip(a / "criu/core-1.img", 0), "criu/core-1.img: the 8 MiB at offset 0"),
}


@pytest.mark.parametrize("what", list(DAMAGES))
def test_a_damaged_image_is_refused_and_the_damage_named(what: str, store: ImageStore) -> None:
    write(store)
    damage, words = DAMAGES[what]
    damage(store.root / "a")
    with store.open("a") as image:
        with pytest.raises(
            errors.CriuError, match="is damaged and cannot be brought back"
        ) as failed:
            image.verify()
        assert words in str(failed.value)
        with pytest.raises(errors.CriuError, match="is damaged"), image.verifying():
            pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda old: old[:-10], "damaged"),
        (lambda old: old[: len(old) // 2], "damaged"),
        (lambda old: old.replace(b"job", b"jab"), "damaged"),
        (lambda _: b"", "damaged"),
        (lambda _: os.urandom(500), "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused_and_listed(
    content: Callable[[bytes], bytes], words: str, store: ImageStore
) -> None:
    write(store, size=10)
    file = store.root / "a" / "manifest"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(errors.CriuError, match=words):
        store.open("a")
    (listed,) = store.images()
    assert listed.manifest is None
    assert words in listed.problem
    store.delete("a")


def test_another_format_and_anothers_manifest_are_refused(store: ImageStore) -> None:
    made = write(store, size=10)
    file = store.root / "a" / "manifest"
    file.write_bytes(manifest.encode(msgspec.structs.replace(made, format=2)))
    with pytest.raises(errors.CriuError, match="it has format 2; this gpusched reads 1"):
        store.open("a")
    (store.root / "a").rename(store.root / "b")
    (store.root / "b" / "manifest").write_bytes(manifest.encode(made))
    with pytest.raises(errors.CriuError, match="its manifest is that of a"):
        store.open("b")


@pytest.mark.criu
def test_what_comes_from_damaged_memory_never_runs(
    tmp_path: Path, store: ImageStore, criu: Program
) -> None:
    with counting(tmp_path / "log", mib=24) as tree:
        save(criu, tree, store)
    flip(store.root / "a/criu/pages-1.img", 20 << 20)
    with isolated(tmp_path / "log2") as tree, store.open("a") as image, Inside(tree.init) as inside:
        fd = image.open_criu()
        with pytest.raises(errors.CriuError, match="is damaged"), image.verifying():
            (task,) = run.restore(criu, inside, fd, name="job", timeout_s=30).tasks
        os.close(fd)
        assert [one.state for one in inside.tasks()] == ["T"]
        run.end_everybody(inside)
        assert inside.everybody() == []
        assert task.pid


# -- checksums ------------------------------------------------------------------------------------


def test_sums_are_the_same_however_a_file_is_read(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    for name, size in {
        "x-0": 0,
        "x-1": 1,
        "x-2": PIECE_BYTES,
        "x-3": 2 * PIECE_BYTES + 4097,
    }.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    names = [f"x-{n}" for n in range(4)]
    after = checksums.sum_files(directory, names)
    assert [len(after[name].pieces) for name in names] == [0, 1, 1, 3]
    assert Follower(directory, "x-").finish() == after
    for direct in (False, True):
        checksums.verify_files(directory, after, direct=direct)
    flip(tmp_path / "x-1", 0)
    for direct in (False, True):
        with pytest.raises(Damaged):
            checksums.verify_files(directory, after, direct=direct)
    os.close(directory)


def test_a_file_is_summed_while_it_grows(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    follower = Follower(directory, "pages-")
    (tmp_path / "other").write_text("not asked for")
    with (tmp_path / "pages-1.img").open("wb") as file:
        for n in range(40):
            file.write(os.urandom(300_000 + n))
            file.flush()
            time.sleep(0.002)
    sums = follower.finish()
    assert sums == checksums.sum_files(directory, ["pages-1.img"])
    os.close(directory)


# -- directories of the tree's own ----------------------------------------------------------------


@pytest.mark.root
def test_a_directory_is_saved_and_restored_as_it_was(tmp_path: Path, store: ImageStore) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for directory in (old, new):
        directory.mkdir()
    (old / "dir").mkdir(mode=0o750)
    (old / "dir" / "file").write_text("x")
    os.chown(old / "dir" / "file", 65534, 65534)
    (old / "secret").symlink_to("/etc/shadow")
    with (old / "holes").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(10 << 20)
        file.write(b"y")
    os.mkfifo(old / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(old / "socket"))
    (old / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", old / "below"], check=True)
    (old / "below" / "theirs").write_text("")
    fds = [os.open(directory, os.O_RDONLY) for directory in (old, new)]
    try:
        with store.begin("a") as draft:
            draft.save_directory("shm", fds[0])
            made = draft.commit(ABOUT)
    finally:
        subprocess.run(["umount", old / "below"], check=True)
    assert made.files["shm.tar"].size_bytes < 1 << 20
    with store.open("a") as image:
        image.restore_directory("shm", fds[1])
    for fd in fds:
        os.close(fd)
    assert sorted(str(p.relative_to(new)) for p in new.rglob("*")) == [
        *("below", "dir", "dir/file", "fifo", "holes", "secret"),
    ]
    assert (new / "dir").stat().st_mode & 0o777 == 0o750
    assert (new / "dir/file").stat().st_uid == 65534
    assert str((new / "secret").readlink()) == "/etc/shadow"
    assert (new / "holes").read_bytes() == (old / "holes").read_bytes()
    assert (new / "holes").stat().st_blocks < 100
    with pytest.raises(errors.InvalidRequest):
        image.restore_directory("../x", 0)


# -- what must be unchanged -----------------------------------------------------------------------


def stamp(
    size: int = 5, mtime: int = 1, ends: str = "e", *, elf: bool = False, uid: int = 0
) -> Stamp:
    mode = 0o100644
    return Stamp(mode=mode, uid=uid, gid=0, size_bytes=size, mtime_ns=mtime, ends=ends, elf=elf)


def differences(
    now: Machine, stamps: dict[str, Stamp | None], **used: Any
) -> list[tuple[str, bool]]:
    fields = {"path": "/lib/x.so", "stamp": stamp(elf=True), "mapped": True, "writable": False}
    files = (UsedFile(**{**fields, **used}),)
    made = Manifest(
        image_id="a", name="job", uid=0, created_unix_s=0, vram_bytes=1, machine=MACHINE, used=files,
        files={}, record={},
    )  # fmt: skip
    return [
        (str(one), one.blocks) for one in manifest.compare(made, now, stamps, replaced=["/log"])
    ]


SAME = {"/lib/x.so": stamp(elf=True)}


def test_nothing_has_changed_after_a_reboot_or_a_package_installed_again() -> None:
    assert differences(MACHINE, dict(SAME)) == []
    rebooted = msgspec.structs.replace(MACHINE, boot_id="c", cpu_flags=("avx", "avx512f", "sse"))
    assert differences(rebooted, {"/lib/x.so": stamp(mtime=2, elf=True)}) == []
    assert differences(MACHINE, {"/log": None}, path="/log") == []  # it will be given anew


@pytest.mark.parametrize(
    ("change", "message", "blocks"),
    [
        ({"kernel": "6.19"}, "the kernel was 6.18.1 when it was saved and is 6.19 now", False),
        ({"cpu_flags": ("sse",)}, "this CPU lacks avx, which the programs may use", True),
        ({"criu_version": (4, 1)}, "CRIU 4.2.1 saved it, and 4.1 is older", True),
        (
            {"driver_version": "590.2"},
            "the NVIDIA driver was 580.1 when it was saved and is 590.2 now; its GPU state can only come back "
            "with the old one",
            True,
        ),
        (
            {"gpus": (Gpu(uuid="GPU-2", name="H100"),)},
            "GPU-1 (H100) is not in this machine any more; GPU-2 is of the same kind",
            False,
        ),
        (
            {"gpus": (Gpu(uuid="GPU-2", name="A100"),)},
            "GPU-1 (H100) is not in this machine any more, nor another of its kind",
            True,
        ),
    ],
)
def test_what_has_changed_in_the_machine_is_named(
    change: dict[str, Any], message: str, blocks: bool
) -> None:
    now = msgspec.structs.replace(MACHINE, **change)
    assert differences(now, dict(SAME)) == [(message, blocks)]


@pytest.mark.parametrize(
    ("now", "used", "message", "blocks"),
    [
        (None, {}, "/lib/x.so is gone; it was mapped when the process was saved", True),
        (
            None,
            {"mapped": False},
            "/lib/x.so is gone; it was open when the process was saved",
            True,
        ),
        (
            stamp(size=6),
            {},
            "/lib/x.so is another file than when the process was saved (5 bytes then, 6 now)",
            True,
        ),
        (
            stamp(ends="f"),
            {},
            "/lib/x.so is another file than when the process was saved (other contents)",
            True,
        ),
        (
            stamp(ends="f"),
            {"kept": "0"},
            "/lib/x.so is another file than when the process was saved (other contents); the image has a copy",
            False,
        ),
        (
            stamp(uid=7, elf=True),
            {},
            "/lib/x.so is another file than when the process was saved (mode 100644, uid 0, gid 0 then, "
            "mode 100644, uid 7, gid 0 now)",
            True,
        ),
        (None, {"kept": "0"}, "/lib/x.so is gone; it was mapped when the process was saved", True),
        (
            stamp(mtime=2),
            {"stamp": stamp()},
            "/lib/x.so is another file than when the process was saved (other contents)",
            True,
        ),
    ],
)
def test_what_has_changed_in_a_file_is_named(
    now: Stamp | None, used: dict[str, Any], message: str, blocks: bool
) -> None:
    assert differences(MACHINE, {"/lib/x.so": now}, **used) == [(message, blocks)]


@pytest.mark.criu
def test_the_files_of_a_real_process_are_known_again(tmp_path: Path, criu: Program) -> None:
    with counting(tmp_path / "log") as tree, Inside(tree.init) as inside:
        tasks = inside.tasks()
        os.kill(tasks[0].pid, signal.SIGSTOP)
        used = {one.path: one for one in system.used_files(inside, tasks)}
        assert used[str(tmp_path / "log")].writable
        assert not used[str(tmp_path / "log")].mapped
        libraries = [one for one in used.values() if "libc" in one.path]
        assert libraries[0].mapped
        assert libraries[0].stamp.elf
        assert not [path for path in used if path.startswith(("/dev", "/proc", "["))]
        assert used["/"].mapped is False  # where it works
        seen = system.look(inside, used)
        assert {path: one.stamp for path, one in seen.items() if one} == {
            path: one.stamp for path, one in used.items()
        }
        (tmp_path / "link").symlink_to(tmp_path / "log")
        links = ["/dev/null", "/nonexistent", str(tmp_path / "link"), "/proc/self/exe"]
        assert system.look(inside, links) == dict.fromkeys(links)


def test_the_machine_is_read_with_its_gpus_where_there_are_some() -> None:
    program = Program(path="/c", version=(4, 2), executable="/c")
    machine = system.read_machine(program)
    assert machine.kernel == os.uname().release
    assert machine.cpu_flags
    assert (machine.driver_version, machine.gpus, machine.criu_version) == ("", (), (4, 2))
    driver = Description(
        backend="cuda", simulated=False, driver_version="580.1", gpus=(), can_migrate=True
    )
    assert system.read_machine(program, driver).driver_version == "580.1"


def test_lines_of_maps_are_understood() -> None:
    line = b"7f00-7f01 rw-s 00000000 fe:00 12   /tmp/a\\040b\\012c"
    assert system.parse_mapping(line) == system.Mapping("7f00-7f01", "/tmp/a b\nc", True)
    line = b"7f00-7f01 rw-p 0 fe:00 12 /lib/x.so"
    assert system.parse_mapping(line) == system.Mapping("7f00-7f01", "/lib/x.so", False)
    for tail in (b"", b"[heap]", b"anon_inode:[io_uring]"):
        assert system.parse_mapping(b"7f00-7f01 r--p 00000000 fe:00 12   " + tail) is None
    for path in ("/memfd:x (deleted)", "/usr/x (deleted)", "/dev/shm/x", "/SYSV0", "socket:[1]"):
        assert not system.is_named(path)
    assert system.is_named("/usr/x")
