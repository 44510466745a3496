"""The library that takes a program's VRAM past the driver's own copy, and how a program gets it. Standard library only.

What ``run`` starts on one GPU has it by itself. A program that is started by others and adopted, or attached in Ray,
moves as fast with ``preload_env`` in its environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gpusched import errors

_VARIABLE = "LD_PRELOAD"


def library() -> str:
    """The path of the library; empty where it was not built, or where no linker would take the path."""
    found = sorted((Path(__file__).parent / "native").glob("direct*.so"))
    if not found or any(c in str(found[0]) for c in ": \t\n"):
        return ""
    return str(found[0])


def preloaded(path: str, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that add the library at ``path`` to what ``env`` preloads already."""
    others = [each for each in env.get(_VARIABLE, "").split(":") if each not in ("", path)]
    return {_VARIABLE: ":".join([path, *others])}


def preload_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables with which a program that ``run`` does not start can be moved at the speed of the bus.

    They do nothing in programs that do not use CUDA. For workers that share device memory by CUDA IPC they are not:
    that is refused in a program that has them. Give them at its start; later is too late.

    Args:
        env: What it would be started with otherwise; what that preloads stays. By default nothing.

    Raises:
        Unsupported: the library was not built here (it needs a C compiler when gpusched is installed), or its path
            has a space or a colon, which the linker does not take.
    """
    path = library()
    if not path:
        raise errors.Unsupported(
            "there is no library to preload: it is built when gpusched is installed where a C compiler is, and "
            "needs a path without spaces and colons; `gpusched doctor` says what is missing"
        )
    return preloaded(path, {} if env is None else env)
