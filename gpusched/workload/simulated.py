"""The workload's memory on simulated GPUs. Standard library only: it starts in a tenth of a second."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import Final

from gpusched.mechanisms.sim import device
from gpusched.units import MIB, format_size
from gpusched.workload.memory import Exit, WorkloadError, chunks

_BLOCK_BYTES: Final = MIB
#: Read in one call of the device, so that a lock waits for milliseconds only.
_PASS_BYTES: Final = 16 * MIB
_HEADER: Final = struct.Struct("<QQ")


class SimulatedMemory:
    """VRAM on visible simulated GPUs, an equal part on each."""

    simulated = True

    def __init__(self, size_bytes: int, devices: Sequence[int]) -> None:
        """Allocates. Raises WorkloadError, with the figures where it does not fit."""
        share = size_bytes // len(devices) // 8 * 8
        try:
            session = device.init()
            self._buffers = [
                session.allocate(size, number) for number in devices for size in chunks(share)
            ]
        except device.OutOfMemory as error:
            message = f"{error} ({format_size(size_bytes)} in all)"
            raise WorkloadError(message, Exit.OUT_OF_MEMORY) from error
        except device.SimError as error:
            raise WorkloadError(str(error)) from error

    def fill(self, seed: int) -> None:
        pattern = _Pattern(seed)
        number = 0
        for buffer in self._buffers:
            for offset in range(0, buffer.size_bytes, _BLOCK_BYTES):
                buffer.write(
                    offset, pattern.block(number)[: min(_BLOCK_BYTES, buffer.size_bytes - offset)]
                )
                number += 1
        size = min(_BLOCK_BYTES, self._buffers[0].size_bytes)
        if self._buffers[0].read(0, size) != pattern.block(0)[:size]:
            raise WorkloadError("the first MiB is not what was written", Exit.CORRUPT)

    def digest(self) -> int:
        sums = []
        for buffer in self._buffers:
            for offset in range(0, buffer.size_bytes, _PASS_BYTES):
                size = min(_PASS_BYTES, buffer.size_bytes - offset)
                with buffer.access(offset, size) as view:
                    sums += [
                        _checksum(view, start, min(start + _BLOCK_BYTES, size))
                        for start in range(0, size, _BLOCK_BYTES)
                    ]
        packed = struct.pack(f"<{len(sums)}I", *sums)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big")


class _Pattern:
    """Contents of blocks: one random block for each seed, rotated and numbered, so no two blocks are alike."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._twice = memoryview(
            hashlib.shake_128(b"%d" % seed).digest(_BLOCK_BYTES) * 2,
        )

    def block(self, number: int) -> bytes:
        start = number * 40_503 % _BLOCK_BYTES
        rest = self._twice[start + _HEADER.size : start + _BLOCK_BYTES]
        return _HEADER.pack(self._seed, number) + rest


def _checksum(view: memoryview, start: int, end: int) -> int:
    with view[start:end] as part:
        return zlib.crc32(part)
