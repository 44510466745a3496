"""gpusched: several models share a GPU by turns. This package's top level is the SDK.

``import gpusched`` loads nothing; a name is imported when it is first used, with the standard library alone.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own constant would cost its import
if TYPE_CHECKING:
    from gpusched import errors, types
    from gpusched.aio import AsyncGpuSched
    from gpusched.client import GpuSched
    from gpusched.errors import DaemonUnavailable, GpuschedError
    from gpusched.preload import preload_env

__version__ = "0.1.0"

__all__ = [
    "AsyncGpuSched",
    "DaemonUnavailable",
    "GpuSched",
    "GpuschedError",
    "__version__",
    "errors",
    "preload_env",
    "types",
]

#: Public name -> the module it lives in; a module is its own home.
_HOME = {
    "AsyncGpuSched": "gpusched.aio",
    "DaemonUnavailable": "gpusched.errors",
    "GpuSched": "gpusched.client",
    "GpuschedError": "gpusched.errors",
    "errors": "gpusched.errors",
    "preload_env": "gpusched.preload",
    "types": "gpusched.types",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gpusched' has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_HOME[name])
    value = module if module.__name__ == f"gpusched.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
