"""The classes that the tests make freezable; also run as plain Ray actors, to compare."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from gpusched.mechanisms.sim import device
from ray_integration import is_cancelled


class OddError(Exception):
    """Cannot be pickled and unpickled: its constructor wants more than its args."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"odd {a} {b}")


class Model:
    """Some state, some VRAM, and a method for each kind of call."""

    def __init__(self, start: int = 0, vram_bytes: int = 0) -> None:
        self.count = start
        self.made_on = threading.current_thread().name
        self.log: list[int] = []
        self.vram = None
        if vram_bytes:
            self.vram = device.init().allocate(vram_bytes)
            self.vram.write(0, b"first bytes")

    def add(self, amount: int = 1) -> int:
        self.count += amount
        self.log.append(amount)
        return self.count

    def history(self) -> list[int]:
        return self.log

    def contents(self) -> bytes:
        assert self.vram is not None
        return self.vram.read(0, 11)

    def digest(self) -> int:
        """Of the whole VRAM."""
        assert self.vram is not None
        with self.vram.access() as view:
            return zlib.crc32(view)

    def slow_add(self, amount: int, seconds: float) -> int:
        time.sleep(seconds)
        return self.add(amount)

    def where(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "made_on": self.made_on,
            "called_on": threading.current_thread().name,
            "is_ray_initialised": "ray" in sys.modules and ray.is_initialized(),
            "ray_variables": sorted(name for name in os.environ if name.startswith("RAY_")),
            "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "cwd": str(Path.cwd()),
            "executable": sys.executable,
            "path": list(sys.path),
            "uid": os.getuid(),
            "environment": dict(os.environ),
        }

    @ray.method(num_returns=2)
    def pair(self) -> tuple[int, int]:
        return 1, 2

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    def items(self, n: int) -> Iterator[int]:
        for i in range(n):
            self.count = i
            yield i

    def fail(self, key: str) -> None:
        self._deeper(key)

    def _deeper(self, key: str) -> None:
        raise KeyError(key)

    def fail_oddly(self) -> None:
        raise OddError(1, 2)

    def until_cancelled(self) -> str:
        while not is_cancelled():
            time.sleep(0.01)
        return "cancelled"

    def total(self, array: Any) -> float:
        return float(array.sum())

    def keep(self, array: Any) -> None:
        self.kept = array

    def kept_total(self) -> float:
        return float(self.kept.sum())

    def ones(self, n: int) -> Any:
        return np.ones(n)

    def echo(self, value: Any) -> Any:
        return value

    def crash_once(self, flag: str) -> str:
        if not Path(flag).exists():
            Path(flag).touch()
            os._exit(7)
        return "the second time"

    def crash(self) -> None:
        os._exit(7)


class AsyncModel:
    def __init__(self) -> None:
        self.cancelled = 0

    async def wait(self, seconds: float) -> float:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return seconds

    async def numbers(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    async def fail(self) -> None:
        raise KeyError("async")

    def plain(self) -> tuple[int, str]:
        return self.cancelled, threading.current_thread().name


class Rank:
    """One of two ranks: its hooks wait for the other's, as collective operations do, and can be told to fail."""

    def __init__(self, rank: int, directory: str) -> None:
        self.rank = rank
        self.directory = Path(directory)
        self.said: list[str] = []
        self.fails: str | None = None

    def before_freeze(self) -> None:
        self._meet("before_freeze")

    def after_thaw(self) -> None:
        self._meet("after_thaw")

    def _meet(self, name: str) -> None:
        if self.fails == name:
            raise RuntimeError(f"rank {self.rank} is told to fail")
        self.said.append(f"{name} on {threading.current_thread().name}")
        mine = self.directory / f"{name}-{len(self.said)}"
        mine.with_suffix(f".{self.rank}").touch()
        deadline = time.monotonic() + 10
        while not mine.with_suffix(f".{1 - self.rank}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {1 - self.rank} did not come to {name}")
            time.sleep(0.01)

    def fail(self, name: str | None) -> None:
        self.fails = name

    def slow(self, seconds: float) -> None:
        time.sleep(seconds)

    def history(self) -> list[str]:
        return self.said
