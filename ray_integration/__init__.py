"""ray_integration: models as handles that Ray programs freeze, thaw and swap. See docs/ray.md.

``import ray_integration`` loads nothing; a name is imported when it is first used, so that a model's host, which
imports this package, does not import Ray.
"""

from __future__ import annotations

from typing import Any

#: Public name -> the module it lives in.
_HOME = {
    "Group": "groups",
    "Phases": "phases",
    "attach": "control",
    "fork": "replicas",
    "freeze": "control",
    "group": "groups",
    "hibernate": "control",
    "on_gpu": "phases",
    "on_gpu_of": "accounting",
    "place_models": "accounting",
    "status": "control",
    "swap": "control",
    "thaw": "control",
    "DrainTimeout": "errors",
    "HookFailed": "errors",
    "TorchDistributedHooks": "torch_groups",
    "HostError": "errors",
    "HostLost": "errors",
    "ModelFrozen": "errors",
    "freezable": "actor_class",
    "is_cancelled": "lanes",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ray_integration' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"ray_integration.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
