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
    """``env`` with the library at ``path`` before whatever else it preloads."""
    return {**env, _VARIABLE: ":".join([path, *_others(path, env)])}


def not_preloaded(path: str, env: Mapping[str, str]) -> dict[str, str]:
    """``env`` without the library at ``path``; what else it preloads stays."""
    left = {name: value for name, value in env.items() if name != _VARIABLE}
    others = _others(path, env)
    return {**left, _VARIABLE: ":".join(others)} if others else left


def _others(path: str, env: Mapping[str, str]) -> list[str]:
    """The linker takes colons and spaces between them."""
    return [
        each
        for each in env.get(_VARIABLE, "").replace(" ", ":").split(":")
        if each not in ("", path)
    ]


def preload_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables with which a program that ``run`` does not start can be moved at the speed of the bus.

    They do nothing in programs that do not use CUDA. In programs that do, CUDA IPC does not work: workers that share
    device memory with each other do without. Give them at its start; later is too late.

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
    return {_VARIABLE: preloaded(path, {} if env is None else env)[_VARIABLE]}
