"""Interception of an object's calls, below everything that patches its attributes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Call = Callable[..., Any]
Handler = Callable[[Call, tuple[Any, ...], Mapping[str, Any]], Any]


@contextmanager
def intercept(
    target: Any, handler: Handler, method: str = "__call__", copies: bool = False
) -> Iterator[None]:
    """Inside, `target.method(*args, **kwargs)` is `handler(call, args, kwargs)`.

    copies: also that of objects that are copied from the target meanwhile.

    `call` is the method itself. The class of the object is replaced by a subclass of the same name:
    an attribute of the instance would be lost where offloading, compilation or caching hooks
    rebuild `forward`, and copies of the object would carry it along.
    """
    original: type = type(target)
    active, found = True, [target]

    def wrap(function: Call) -> Call:
        @functools.wraps(function)
        def intercepted(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = functools.partial(function, self)
            if active and (self is target or copies):
                if self is not target and not any(self is one for one in found):
                    found.append(self)
                return handler(call, args, kwargs)
            return call(*args, **kwargs)

        inner = getattr(function, "__wrapped__", None)
        if inner is not None:  # pipelines without torch.no_grad are called through it
            intercepted.__wrapped__ = wrap(inner)
        vars(intercepted)["__signature__"] = signature_of(function)
        return intercepted

    names = ("__module__", "__qualname__", "__doc__")
    members = {name: getattr(original, name) for name in names}
    members[method] = wrap(getattr(original, method))
    replaced = _alike(original)(original.__name__, (original,), members)
    object.__setattr__(target, "__class__", replaced)  # wrappers forward their attributes
    try:
        yield
    finally:
        active = False
        for one in found:
            if type(one) is replaced:  # else a later interception ends after this one
                object.__setattr__(one, "__class__", original)


def signature_of(function: Call) -> inspect.Signature:
    """The signature of a function, read once. Raises what `inspect.signature` raises."""
    return _signature(inspect.unwrap(function))  # an interception would keep its target in memory


@functools.cache
def _signature(function: Call) -> inspect.Signature:
    return inspect.signature(function)


def _alike(original: type) -> type:
    """Metaclass of a subclass that equals its base: some pipelines compare `type(x) == Class`."""
    kind: type = type(original)

    class Alike(kind):
        def __eq__(self, other: object) -> bool:
            return self is other or other is original

        def __hash__(self) -> int:
            return hash(original)

    return Alike
