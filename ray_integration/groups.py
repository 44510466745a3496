"""Groups of models under a name: the ranks of one model, or all that a phase needs.

A group is frozen and thawed whole or not at all, as every list of models is. Names are known in the process that made
the group; the group itself can be sent anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpusched import errors
from ray_integration import compat

_groups: dict[str, Group] = {}


class Group:
    """Handles under a name."""

    def __init__(self, name: str, handles: Iterable[Any]) -> None:
        self.name = name
        self.handles = tuple(handles)
        if not self.handles or not all(map(compat.is_handle, self.handles)):
            raise errors.InvalidRequest(
                f"the group {name!r} must be made of one or more actor handles"
            )

    def __repr__(self) -> str:
        return f"<Group {self.name} of {len(self.handles)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self.name, self.handles)


def group(name: str, handles: Iterable[Any]) -> Group:
    """Makes a group and gives it this name here, in place of an older one of that name."""
    made = _groups[name] = Group(name, handles)
    return made


def by_name(name: str) -> Group | None:
    return _groups.get(name)
