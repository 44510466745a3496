"""Ready-made hooks for ranks of ``torch.distributed``: communicators end before a freeze, and are made anew after it.

    class Policy(TorchDistributedHooks):
        def __init__(self, rank, ranks):
            self.join("nccl", init_method="file:///tmp/policy", rank=rank, ranks=ranks)
            self.add_group("tensor", [0, 1])

        def step(self):
            dist.all_reduce(self.loss, group=self.groups["tensor"])

Runs in the host. PyTorch is imported when a process group is made, not before.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

#: Seconds that ranks wait for one another; less than a hook may take, so that what went wrong is said.
TIMEOUT_S: Final = 60.0
_RETRY_S: Final = 0.2


class TorchDistributedHooks:
    """A mixin for the class of a rank. All ranks are frozen and thawed together: as one list or group.

    Attributes:
        groups: The process groups of ``add_group`` by name. Others after each thaw: look them up when they are used.
    """

    groups: dict[str, Any]
    _join: dict[str, Any] | None = None

    def join(
        self,
        backend: str,
        *,
        init_method: str,
        rank: int,
        ranks: int,
        timeout_s: float = TIMEOUT_S,
        **options: Any,
    ) -> None:
        """Makes the default process group. Blocks until all ``ranks`` have come, up to ``timeout_s`` seconds.

        ``init_method``: ``file:///path`` (a directory that all ranks share) or ``tcp://host:port``. ``options``: more
        of ``torch.distributed.init_process_group``.
        """
        self._join = {
            "backend": backend,
            "init_method": init_method,
            "rank": rank,
            "world_size": ranks,
            "timeout": timedelta(seconds=timeout_s),
            **options,
        }
        self._members: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {}
        self._times = 0
        self._make()

    def add_group(self, name: str, ranks: Sequence[int], **options: Any) -> Any:
        """Makes a group of some ranks, kept in ``groups``. All ranks call it, in the same order, as ``new_group``."""
        import torch.distributed as dist

        self._members[name] = (tuple(ranks), options)
        made = self.groups[name] = dist.new_group(list(ranks), **options)
        return made

    # -- the hooks ------------------------------------------------------------------------------

    def before_freeze(self) -> None:
        """No rank is in a collective any more, then all communicators end. A class that has its own calls this too."""
        if self._join is None:
            return
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # Whoever fails does so here, on every rank, with all groups as they were.
        dist.barrier()
        self.groups = {}
        dist.destroy_process_group()
        gc.collect()  # the store's sockets and files go with the last reference

    def after_thaw(self) -> None:
        """The default group and all others are there again, in the order in which they were first made."""
        if self._join is not None:
            self._make()

    def _make(self) -> None:
        import torch.distributed as dist

        assert self._join is not None
        options = dict(self._join)
        self._times += 1
        if options["init_method"].startswith("file:"):
            # A file of its own each time: an old one has the keys of ranks that have left.
            options["init_method"] += f".{self._times}"
        deadline = time.monotonic() + self._join["timeout"].total_seconds()
        while True:
            try:
                dist.init_process_group(**options)
            except dist.DistNetworkError:  # the port of the last time is not free yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
            else:
                break
        self.groups = {
            name: dist.new_group(list(ranks), **more)
            for name, (ranks, more) in self._members.items()
        }
