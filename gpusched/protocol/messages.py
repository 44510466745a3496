"""The parameters of every method, typed and validated. Unknown parameters are ignored (wire.md's promise).

Sizes are checked here; meaning (does the name exist, may this user) is the engine's.
"""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta, Struct

#: A process's name: also a file name below the log directory, so nothing else may get through.
MAX_NAME = 64
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
GpuIndex = Annotated[int, Meta(ge=0, le=1023)]
Argument = Annotated[str, Meta(max_length=131072)]
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
Names = Annotated[list[Name], Meta(max_length=256)]


class NoParams(Struct, frozen=True):
    """No parameters."""


class Run(Struct, frozen=True, kw_only=True):
    name: Name
    cmd: Annotated[list[Argument], Meta(min_length=1, max_length=65536)]
    dir: str | None = None
    gpu: GpuIndex = 0
    gpus: Annotated[list[GpuIndex], Meta(min_length=1, max_length=64)] | None = None
    env: dict[str, str] | None = None
    evictable: bool = False
    isolate: bool | None = None


class Adopt(Struct, frozen=True, kw_only=True):
    pid: Annotated[int, Meta(gt=0, le=2**22)]
    name: Name
    evictable: bool = False
    stop: bool = True


class Freeze(Struct, frozen=True, kw_only=True):
    """``keep_context``: its CUDA context may stay on the GPU, until somebody needs the room."""

    name: Name
    force: bool = False
    keep_context: bool = False


class Thaw(Struct, frozen=True, kw_only=True):
    name: Name
    evict: bool = False


class Swap(Struct, frozen=True, kw_only=True):
    """``off`` and ``on``: one name or a list. Either list may be empty: several go off, or come on, as one.

    A single name is checked here: msgspec 0.22 crashes at exit when a pattern stands inside a union.
    """

    off: str | Names
    on: str | Names
    force: bool = False
    keep_context: bool = False

    def __post_init__(self) -> None:
        for name in (self.off, self.on):
            if isinstance(name, str) and not re.match(NAME_PATTERN, name):
                raise ValueError(f"{name!r} is not a name")
        if not self.off and not self.on:
            raise ValueError("off and on are both empty")


class Migrate(Struct, frozen=True, kw_only=True):
    name: Name
    gpu: GpuIndex | None = None
    gpus: Annotated[list[GpuIndex], Meta(min_length=1, max_length=64)] | None = None
    force: bool = False


class Kill(Struct, frozen=True, kw_only=True):
    name: Name
    force: bool = False


class Acquire(Struct, frozen=True, kw_only=True):
    name: Name
    for_s: Seconds | None = None
    evict: bool = False


class Release(Struct, frozen=True, kw_only=True):
    name: Name


class Hibernate(Struct, frozen=True, kw_only=True):
    name: Name
    force: bool = False


class Fork(Struct, frozen=True, kw_only=True):
    name: Name
    copies: Annotated[int, Meta(ge=1, le=256)] = 2
    gpus: Annotated[list[GpuIndex], Meta(min_length=1, max_length=64)] | None = None
    force: bool = False


class VerifySnapshot(Struct, frozen=True, kw_only=True):
    name: Name


class DeleteSnapshot(Struct, frozen=True, kw_only=True):
    name: Name


class Logs(Struct, frozen=True, kw_only=True):
    name: Name
    lines: int = 50
    follow: bool = False
