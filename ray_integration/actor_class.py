"""``freezable``: an ordinary class becomes an ordinary Ray actor class whose model lives in a host process.

What comes out is what ``ray.remote`` makes: ``.options``, ``.remote``, handles, named and detached actors, and
``@ray.method`` work as they do. The actor that Ray starts has a method for each of the class's, with the same
parameters, that passes the call on.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, overload

import ray

from ray_integration import compat
from ray_integration.copies import write_recipe
from ray_integration.hooks import NAMES
from ray_integration.host import has_async_methods
from ray_integration.proxy import OnFrozen, Proxy, Settings

if TYPE_CHECKING:
    from ray.actor import ActorClass

#: Not passed on: they are about the object itself, and Ray or Python calls them on the proxy.
_OWN: Final = frozenset(
    {
        *("__init__", "__new__", "__del__", "__repr__", "__str__", "__hash__", "__eq__", "__ne__"),
        *("__getattr__", "__getattribute__", "__setattr__", "__delattr__", "__dir__"),
        *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__"),
        *("__getnewargs_ex__", "__init_subclass__", "__class_getitem__", "__subclasshook__"),
    }
)


@overload
def freezable(cls: type, /) -> ActorClass[Any]: ...
@overload
def freezable(
    *,
    on_frozen: OnFrozen = ...,
    gpus: Sequence[int] | None = ...,
    evictable: bool = ...,
    isolate: bool | None = ...,
    start_frozen: bool = ...,
    env: Mapping[str, str] | None = ...,
    **ray_options: Any,
) -> Callable[[type], ActorClass[Any]]: ...
def freezable(
    cls: type | None = None,
    /,
    *,
    on_frozen: OnFrozen = "queue",
    gpus: Sequence[int] | None = None,
    evictable: bool = False,
    isolate: bool | None = None,
    start_frozen: bool = False,
    env: Mapping[str, str] | None = None,
    **ray_options: Any,
) -> Any:
    """Makes a Ray actor class of ``cls``; with options alone, returns a decorator that does.

    Args:
        cls: An ordinary class. Its instances never exist in the Ray worker, only in the host.
        on_frozen: What a call on a frozen model does: wait for somebody's thaw (``queue``), bring the model on the GPU
            itself, with idle models going off for it (``thaw``), or raise ModelFrozen (``raise``).
        gpus: The daemon's numbers of the host's GPUs; by default those that Ray assigns (``num_gpus``), else GPU 0.
        evictable: Other users of the daemon may have the model frozen to make room.
        isolate: Namespaces of its own for the host, which the disk tier needs; by default as the daemon was told.
        start_frozen: Freeze the model as soon as its constructor has returned.
        env: Variables for the host, over those of the worker.
        ray_options: What ``ray.remote`` takes: ``num_gpus``, ``max_restarts``, ``concurrency_groups``, ...

    Raises TypeError for what is not an ordinary class, ValueError for an unknown ``on_frozen``.
    """
    if on_frozen not in ("queue", "thaw", "raise"):
        raise ValueError(f"on_frozen is 'queue', 'thaw' or 'raise', not {on_frozen!r}")
    settings = Settings(
        on_frozen=on_frozen,
        gpus=None if gpus is None else tuple(gpus),
        evictable=evictable,
        isolate=isolate,
        start_frozen=start_frozen,
        env=dict(env or {}),
    )
    make = functools.partial(make_actor_class, settings=settings, ray_options=ray_options)
    return make if cls is None else make(cls)


def make_actor_class(
    cls: type, *, settings: Settings, ray_options: Mapping[str, Any]
) -> ActorClass[Any]:
    """See ``freezable``."""
    if compat.is_actor_class(cls) or not isinstance(cls, type):
        raise TypeError(
            f"freezable takes an ordinary class, not {cls!r}; give Ray's options to it: "
            "freezable(num_gpus=1, max_restarts=2)"
        )
    is_async = has_async_methods(cls)
    settings = dataclasses.replace(
        settings,
        hooks=tuple(name for name in NAMES if hasattr(cls, name)),
        hook_lane="thread" if is_async else "main",
    )
    members: dict[str, Any] = {
        name: _forwarding(name, method, is_async=is_async, takes_self=_takes_self(cls, name))
        for name, method in inspect.getmembers(cls, _is_method)
        if name not in _OWN
    }
    members["__init__"] = _constructor(cls, settings, ray_options)
    members["__doc__"] = cls.__doc__
    members["__module__"] = cls.__module__
    proxy_class = type(cls.__name__, (), members)
    call = _forwarding("__ray_call__", _ray_call, is_async=is_async, takes_self=True)
    compat.own_actor_methods(proxy_class, is_async=is_async, call=call)
    made: ActorClass[Any] = (
        ray.remote(**ray_options)(proxy_class) if ray_options else ray.remote(proxy_class)
    )
    return made


def _is_method(member: object) -> bool:
    return inspect.isfunction(member) or inspect.ismethod(member)


def _takes_self(cls: type, name: str) -> bool:
    return inspect.isfunction(inspect.getattr_static(cls, name))


def _ray_call(self: object, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Only its parameters count."""


class _Shipped:
    """A class on its way to a host: pickled where it is known, when Ray sends the actor class, and not unpickled before
    it is there. So the Ray worker never imports what the model needs.
    """

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __reduce__(self) -> tuple[Any, ...]:
        from ray import cloudpickle

        return _Arrived, (cloudpickle.dumps(self._cls),)  # type: ignore[no-untyped-call]


class _Arrived:
    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled

    def __reduce__(self) -> tuple[Any, ...]:
        return _Arrived, (self.pickled,)


def _constructor(cls: type, settings: Settings, ray_options: Mapping[str, Any]) -> Any:
    shipped: Any = _Shipped(cls)
    name = cls.__name__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is one
        self._gpusched = Proxy(settings, name)
        write_recipe(self._gpusched.about.directory, shipped.pickled, settings, ray_options)
        self._gpusched.begin(shipped.pickled, args, kwargs)

    # What takes over a copy makes nothing, so it needs no arguments.
    has_own = cls.__init__ is not object.__init__ and not settings.host  # type: ignore[misc]
    signature = compat.bare_signature(cls.__init__) if has_own else None  # type: ignore[misc]
    __init__.__signature__ = signature or inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    )
    return __init__


def _forwarding(name: str, method: Any, *, is_async: bool, takes_self: bool) -> Any:
    """A method of the same name, parameters and options that passes the call on; of the kind that Ray treats alike."""
    on_main = not hasattr(method, "__ray_concurrency_group__")
    is_stream = inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method)
    made = (_forward_async if is_async else _forward)(name, is_stream=is_stream, on_main=on_main)
    made.__name__ = made.__qualname__ = name
    made.__doc__ = method.__doc__
    signature = compat.bare_signature(method)
    if not takes_self:  # a static or class method
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = signature.replace(parameters=[itself, *signature.parameters.values()])
    made.__signature__ = signature
    for option, value in compat.method_options(method).items():
        setattr(made, option, value)
    return made


def _forward(name: str, *, is_stream: bool, on_main: bool) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._gpusched.call(name, args, kwargs, on_main=on_main)

    def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
        yield from self._gpusched.stream(name, args, kwargs, on_main=on_main)

    return stream if is_stream else call


def _forward_async(name: str, *, is_stream: bool, on_main: bool) -> Any:
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await self._gpusched.call_async(name, args, kwargs)

    async def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
        async for item in self._gpusched.stream_async(name, args, kwargs):
            yield item

    return stream if is_stream else call
