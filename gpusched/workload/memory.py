"""What the workload needs of a GPU, real or simulated, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Final, Protocol

from gpusched.units import GIB

#: Several allocations, like a real program, and none larger than this.
CHUNK_BYTES: Final = GIB


class Exit(IntEnum):
    FAILED = 1
    CORRUPT = 3
    OUT_OF_MEMORY = 4


class WorkloadError(Exception):
    """Ends the workload with a message and an exit code."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message, code)
        self.message = message
        self.code = code


class Memory(Protocol):
    """VRAM on one or several GPUs. Every method may block while the process is frozen, and raise WorkloadError."""

    simulated: bool

    def fill(self, seed: int) -> None:
        """Writes the contents that ``seed`` stands for, and checks a part of them against the CPU's formula."""
        ...

    def digest(self) -> int:
        """64 bits that depend on every byte in VRAM and its place, read anew each time."""
        ...


def chunks(size_bytes: int) -> Iterator[int]:
    """Sizes of the allocations that make up ``size_bytes``."""
    for start in range(0, size_bytes, CHUNK_BYTES):
        yield min(CHUNK_BYTES, size_bytes - start)
