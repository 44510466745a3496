"""Trees as images on disk. See the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gpusched.ports.driver import Obstacle
from gpusched.ports.trees import Identity, Member


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRoom:
    """``used_bytes``: all images; ``free_bytes``: what the file system has left for more."""

    used_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What saving one tree meets: bytes of its image at most; files open for writing, which copies would share."""

    obstacles: tuple[Obstacle, ...]
    need_bytes: int
    shared_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A committed image. ``pids``: host pid -> pid inside, of every member."""

    size_bytes: int
    pids: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """Processes that came back, stopped. ``pids``: pid inside -> host pid."""

    main: Identity
    pids: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A complete image. ``record`` is what the engine wanted kept with it; ``pids``: see ``Saved``.

    ``problem`` says why nothing can be read of it; then the rest is empty.
    """

    image_id: str
    size_bytes: int
    created_unix_s: float = 0.0
    record: Mapping[str, object] = field(default_factory=dict)
    pids: Mapping[int, int] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revival:
    """How processes are to come back from an image: as which tree, with which log, and in which network."""

    tree_id: str
    name: str
    log_path: str
    fresh_log: bool
    own_network: bool


class Disk(Protocol):
    """Isolated trees as images on disk. Every image is whole, synced and checked, or not there."""

    def why_not(self) -> str: ...  # nothing can be saved on this machine; empty when it can
    def room(self) -> DiskRoom: ...

    async def look(
        self, tree_id: str, main: Identity, members: Sequence[Member], record: Mapping[str, object]
    ) -> DiskFacts:
        """What would be in the way of ``save``. Touches nothing."""
        ...

    async def save(
        self,
        image_id: str,
        tree_id: str,
        main: Identity,
        members: Sequence[Member],
        record: Mapping[str, object],
    ) -> Saved:
        """Saves stopped processes, which stay as they are. Blocks for as long as the disk takes.

        Raises CriuError, InsufficientDisk, DeadlineExceeded, Unsupported, Cancelled; then nothing of the image is left.
        """
        ...

    def give_up(self, image_id: str) -> None:
        """The save of this image, if there is one that has not come to its commit, raises Cancelled soon."""
        ...

    async def changes(self, image_id: str) -> list[str]:
        """What is not any more as the image needs it, each for a person to read; empty: it can be woken.

        Raises NotFound where there is no such image.
        """
        ...

    async def wake(self, image_id: str, revival: Revival) -> Woken:
        """The processes of an image, stopped, in fresh namespaces. The image stays.

        Raises CriuError, InsufficientHostMemory, NotFound, DeadlineExceeded; then no process is left.
        """
        ...

    async def images(self) -> list[Image]:
        """All complete images; what a dead daemon left half done is cleared away first."""
        ...

    async def verify(self, image_id: str) -> None:
        """Reads all of an image. Raises CriuError naming the file that is not what was written."""
        ...

    async def delete(self, image_id: str) -> None:
        """Never raises for one that is gone."""
        ...
