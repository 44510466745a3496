"""What an image says about itself, and what of that must be unchanged when it comes back. Pure.

Covers: the manifest's fields, how it is written and read, comparing it with a machine. Does not cover: reading the
machine (``system.py``) and the files of an image (``images.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from gpusched.mechanisms.criu.checksums import FileSum

FORMAT: Final = 1
MAX_BYTES: Final = 256 * 1024 * 1024
#: Of a list of files, so many are named.
_NAMED: Final = 3


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    uuid: str
    name: str


class Stamp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a file or directory is known again.

    ``mode`` has its kind in it. ``ends``: digest of a file's first and last 64 KiB, where an ELF file has its build-id.
    """

    mode: int
    uid: int
    gid: int
    size_bytes: int = 0
    mtime_ns: int = 0
    ends: str = ""
    elf: bool = False


class UsedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file or directory outside of the image that a process had mapped or open. ``kept``: its copy in the image."""

    path: str
    stamp: Stamp
    mapped: bool
    writable: bool
    kept: str | None = None


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What processes rely on. Saved with an image, and read again before it comes back."""

    boot_id: str
    kernel: str
    cpu_flags: tuple[str, ...]
    criu_version: tuple[int, ...]
    driver_version: str = ""  # empty: no GPU's state is in the image
    gpus: tuple[Gpu, ...] = ()


#: A file that had lost its name. The inode of one that has others (hard links); of one that has none, which CRIU makes
#: anew, (uid, gid, mode, size): another one without a name was perhaps root's a moment ago.
Unnamed = int | tuple[int, int, int, int]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``record`` is the caller's own; ``files`` are all files of the image, by their paths in it.

    ``unnamed``: files that had lost the name they were opened by (``Unnamed``).
    """

    format: int = FORMAT
    image_id: str
    name: str
    uid: int
    created_unix_s: float
    vram_bytes: int
    machine: Machine
    used: tuple[UsedFile, ...]
    unnamed: tuple[Unnamed, ...] = ()
    files: dict[str, FileSum]
    record: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        """Of the image's own files; kept copies of others are not counted."""
        return sum(one.size_bytes for one in self.files.values())


class Unreadable(Exception):
    """Not a manifest, or one that was damaged; the text says how."""


def encode(manifest: Manifest) -> bytes:
    """JSON, and a line with the digest of it."""
    text = msgspec.json.encode(manifest)
    return text + b"\n" + hashlib.blake2b(text, digest_size=32).hexdigest().encode() + b"\n"


def decode(content: bytes) -> Manifest:
    """Raises Unreadable."""
    text, _, digest = content.rstrip(b"\n").rpartition(b"\n")
    if hashlib.blake2b(text, digest_size=32).hexdigest().encode() != digest:
        raise Unreadable("its manifest is damaged")
    try:
        kind = _FORMAT.decode(text)
        if kind.format != FORMAT:
            raise Unreadable(f"it has format {kind.format}; this gpusched reads {FORMAT}")
        return _MANIFEST.decode(text)
    except msgspec.DecodeError as error:
        raise Unreadable(f"its manifest is not understood: {error}") from error


class _Format(msgspec.Struct, frozen=True):
    format: int


# Made here, once: msgspec 0.22 crashes where two threads meet a type for the first time; copies come back in several.
_FORMAT: Final = msgspec.json.Decoder(_Format)
_MANIFEST: Final = msgspec.json.Decoder(Manifest)


# -- what has changed -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as it was. ``blocks``: to bring the image back would fail or end badly."""

    kind: str  # "kernel", "cpu", "criu", "driver", "gpu", "file"
    message: str
    blocks: bool

    def __str__(self) -> str:
        return self.message


def compare(
    manifest: Manifest,
    now: Machine,
    stamps: Mapping[str, Stamp | None],
    replaced: Collection[str] = (),
) -> list[Difference]:
    """What has changed since the image was made, the blocking things first; empty when nothing has.

    ``stamps``: the used files as they are now, None where there is none. ``replaced``: paths that will be given
    anew (a log). A file that is kept in the image blocks nothing.
    """
    then = manifest.machine
    found: list[Difference] = []
    if then.kernel != now.kernel:
        message = f"the kernel was {then.kernel} when it was saved and is {now.kernel} now"
        found.append(Difference(kind="kernel", message=message, blocks=False))
    if lost := sorted(set(then.cpu_flags) - set(now.cpu_flags)):
        message = f"this CPU lacks {_some(lost)}, which the programs may use"
        found.append(Difference(kind="cpu", message=message, blocks=True))
    if now.criu_version < then.criu_version:
        message = f"CRIU {_version(then.criu_version)} saved it, and {_version(now.criu_version)} is older"
        found.append(Difference(kind="criu", message=message, blocks=True))
    found += _gpus(then, now)
    found += _files(manifest.used, stamps, replaced)
    return sorted(found, key=lambda one: not one.blocks)


def _gpus(then: Machine, now: Machine) -> list[Difference]:
    found = []
    if then.driver_version and then.driver_version != now.driver_version:
        message = (
            f"the NVIDIA driver was {then.driver_version} when it was saved and is "
            f"{now.driver_version or 'not there'} now; its GPU state can only come back with the old one"
        )
        found.append(Difference(kind="driver", message=message, blocks=True))
    present = {gpu.uuid for gpu in now.gpus}
    for gpu in then.gpus:
        if gpu.uuid in present:
            continue
        same = [other.uuid for other in now.gpus if other.name == gpu.name]
        message = f"{gpu.uuid} ({gpu.name}) is not in this machine any more" + (
            f"; {_some(same)} is of the same kind" if same else ", nor another of its kind"
        )
        found.append(Difference(kind="gpu", message=message, blocks=not same))
    return found


def _files(
    used: Sequence[UsedFile], stamps: Mapping[str, Stamp | None], replaced: Collection[str]
) -> list[Difference]:
    found = []
    for file in used:
        now = stamps.get(file.path)
        if file.path in replaced or (now is not None and is_same(file.stamp, now)):
            continue
        what = "is gone" if now is None else "is another file than"
        message = f"{file.path} {what}" + (
            f"; it was {'mapped' if file.mapped else 'open'} when the process was saved"
            if now is None
            else f" when the process was saved ({_change(file.stamp, now)})"
        )
        covered = file.kept is not None and now is not None
        if covered:
            message += "; the image has a copy"
        found.append(Difference(kind="file", message=message, blocks=not covered))
    return found


def is_same(then: Stamp, now: Stamp) -> bool:
    """A program or library that was installed again is the same; other files are only if nobody wrote to them.

    Also their owners must be: CRIU opens files as root, for processes of users who may have put another in the place.
    """
    if (then.mode, then.uid, then.gid) != (now.mode, now.uid, now.gid):
        return False
    unwritten = then.mtime_ns == now.mtime_ns or then.elf
    return then.size_bytes == now.size_bytes and then.ends == now.ends and unwritten


def _change(then: Stamp, now: Stamp) -> str:
    if (then.mode, then.uid, then.gid) != (now.mode, now.uid, now.gid):
        return (
            f"mode {then.mode:o}, uid {then.uid}, gid {then.gid} then, "
            f"mode {now.mode:o}, uid {now.uid}, gid {now.gid} now"
        )
    if then.size_bytes != now.size_bytes:
        return f"{then.size_bytes} bytes then, {now.size_bytes} now"
    return "other contents"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _version(parts: Sequence[int]) -> str:
    return ".".join(map(str, parts)) or "of an unknown version"
