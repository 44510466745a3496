"""No disk tier: implements ``ports.Disk`` for a machine, or a daemon, that cannot save anything."""

from __future__ import annotations

from gpusched import errors
from gpusched.ports import DiskFacts, DiskRoom, Image, Saved, Woken


class NoDiskTier:
    """A machine, or a daemon, that cannot save anything; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def close(self) -> None: ...

    def why_not(self) -> str:
        return self._reason

    def room(self) -> DiskRoom:
        return DiskRoom(used_bytes=0, free_bytes=0)

    async def images(self) -> list[Image]:
        return []

    def give_up(self, image_id: str) -> None: ...

    async def delete(self, image_id: str) -> None: ...

    async def look(self, *_: object) -> DiskFacts:
        raise errors.Unsupported(self._reason)

    async def save(self, *_: object) -> Saved:
        raise errors.Unsupported(self._reason)

    async def changes(self, image_id: str) -> list[str]:
        return [f"image {image_id} cannot be used: {self._reason}"]

    async def wake(self, *_: object) -> Woken:
        raise errors.Unsupported(self._reason)

    async def verify(self, image_id: str) -> None:
        raise errors.Unsupported(f"image {image_id}: {self._reason}")
