"""After a restart: which processes are on disk, which images count, which are left over.

Covers: what a journal and the images say together, before the live trees are looked at (``recovery.py``). The rules:

1. A complete image that a hibernation was writing is the process; what still lives of it is ended.
2. A process that was coming back has not run, so its image is the process, and what came back is ended.
3. One that had come back, but had not been heard to run, and is gone: its image is the process.
4. A copy that had not run is nobody's yet: it is ended and forgotten.
5. A process on disk whose image is gone is dead, and says so.
6. An image of a process that nobody remembers is that process. (The journal was lost.)
7. Every other image is deleted, but for those that are damaged: a person may want to look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from gpusched import errors
from gpusched.domain.states import ProcState, Trigger
from gpusched.engine.model import OnDisk, Process, from_record
from gpusched.ports import Clock, Disk, ExitStatus, Image, Trees

log = logging.getLogger(__name__)

_S = ProcState
_NOBODY_SAW = ExitStatus()


class DiskRecovery:
    """One pass, before the engine runs; ``note`` tells the person who reads the log."""

    def __init__(
        self, disk: Disk, trees: Trees, clock: Clock, note: Callable[[Process, str], None]
    ) -> None:
        self._disk = disk
        self._trees = trees
        self._clock = clock
        self._note = note
        self._images: dict[str, Image] = {}

    async def begin(self) -> None:
        """Finds the images; whatever of the last daemon was still at work on one is ended."""
        self._images = {image.image_id: image for image in await self._disk.images()}

    def unknown(self, processes: Mapping[str, Process]) -> list[Process]:
        """Rule 6: processes that only their images remember."""
        found = []
        names = {p.name for p in processes.values()}
        for image in self._images.values():
            try:
                process = from_record(image.record["proc"])  # type: ignore[arg-type]  # checked by it
            except (msgspec.ValidationError, KeyError, TypeError) as error:
                log.warning("image=%s has no usable record: %s", image.image_id, error)
                continue
            if process.tree_id in processes or image.record.get("for") != "itself":
                continue
            if process.name in names:
                process = replace(process, name=f"{process.name[:50]}-{process.tree_id[:8]}")
            names.add(process.name)
            self._note(process, "is not in the journal; taken from its image")
            found.append(self._hibernated(process, image, "only its image remembers it"))
        return found

    async def settle(self, process: Process) -> tuple[Process | None, bool]:
        """(process, whether that is settled); None for one that is forgotten. Rules 1, 2, 4 and 5."""
        image = self._image_of(process)
        if process.copy_of is not None and process.state is not _S.DEAD:
            self._note(process, "was a copy that had not run; it is given up")
            await self._end(process)
            return None, True
        match process.state:
            case _S.HIBERNATING if written := self._complete(process.writing):
                await self._end(process)
                self._note(process, "was being saved to disk; is hibernated now")
                return self._hibernated(process, written, "its image is complete"), True
            case _S.WAKING | _S.HIBERNATED if image is not None and image.problem:
                text = f"its image is damaged: {image.problem}"
                self._note(process, text)
                await self._end(process)
                now = self._clock.unix_s()
                kept = process.after(
                    Trigger.FOUND_HIBERNATED, "recovery", now, error=text, main=None
                )
                return kept, True
            case _S.WAKING | _S.HIBERNATED if image is not None:
                if process.state is _S.WAKING:
                    self._note(process, "was coming back from disk; is hibernated still")
                await self._end(process)
                return self._hibernated(process, image, f"was {process.state}"), True
            case _S.WAKING | _S.HIBERNATED:
                text = "its image is gone"
                self._note(process, text)
                found = replace(process, state=_S.HIBERNATED, on_disk=None, main=None)
                now = self._clock.unix_s()
                return found.after(Trigger.EXITED, text, now, error=text, exit=_NOBODY_SAW), True
            case _:
                return replace(process, writing=None), False

    def after_end(self, process: Process) -> Process | None:
        """Rule 3, for a process that is not there any more; None where there is no image of it."""
        image = self._image_of(process)
        if image is None or image.problem or process.state in (_S.DEAD, _S.ACTIVE):
            return None
        self._note(process, "ended before it ran again; is hibernated still")
        return self._hibernated(process, image, "its image is what there is")

    async def finish(self, processes: Mapping[str, Process]) -> None:
        """Rule 7."""
        needed: set[str] = {i.image_id for i in self._images.values() if i.problem}
        needed |= {p.on_disk.image for p in processes.values() if p.on_disk is not None}
        for image_id in self._images.keys() - needed:
            log.info("image=%s belongs to nobody, deleted", image_id)
            await self._disk.delete(image_id)

    def _complete(self, image_id: str | None) -> Image | None:
        image = self._images.get(image_id or "")
        return None if image is None or image.problem else image

    def _image_of(self, process: Process) -> Image | None:
        return self._images.get(process.on_disk.image) if process.on_disk is not None else None

    def _hibernated(self, process: Process, image: Image, why: str) -> Process:
        """``process`` as ``image`` holds it."""
        saved = from_record(image.record["proc"])  # type: ignore[arg-type]  # checked by it
        return process.after(
            Trigger.FOUND_HIBERNATED,
            f"recovery: {why}",
            self._clock.unix_s(),
            main=None,
            oom_scores={},
            moved={},
            on_disk=OnDisk.of(
                saved,
                image.image_id,
                size_bytes=image.size_bytes,
                created_unix_s=image.created_unix_s,
                pids=image.pids,
            ),
            writing=None,
        )

    async def _end(self, process: Process) -> None:
        try:
            await self._trees.end(process.tree_id, process.main)
        except errors.GpuschedError as error:
            self._note(process, str(error))
        await self._trees.forget(process.tree_id)
