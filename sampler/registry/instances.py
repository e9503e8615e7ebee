"""Instances of strategies: the methods that they lack, and their specs."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from sampler.types import GuidanceBase, SamplerBase

Strategy = TypeVar("Strategy")

_BASES: dict[str, type] = {"sampler": SamplerBase, "guidance": GuidanceBase}


def with_defaults(kind: str, strategy: Strategy) -> Strategy:
    """The strategy; a class without the base of its kind gets the base's methods that it lacks.

    Raises ValueError for an object whose class cannot get them.
    """
    base = _BASES.get(kind, object)
    if isinstance(strategy, base):
        return strategy
    lacking = {name for name in vars(base) if not name.startswith("_")} - set(dir(strategy))
    try:
        for name in lacking:
            setattr(type(strategy), name, vars(base)[name])
    except TypeError:
        raise ValueError(
            f"A {kind} has the method {min(lacking)!r}, and {strategy!r:.60} has not; derive its "
            f"class from sampler.{base.__name__}."
        ) from None
    return strategy


def spec_of(strategy: Any) -> Any:
    """{"name": ..., field: ...} of an instance: `build` of it gives an equal instance.

    An object that is not a dataclass is returned unchanged.
    """
    if not is_dataclass(strategy):
        return strategy
    cls: Any = type(strategy)
    spec: dict[str, Any] = {"name": cls.name}
    for entry in fields(cls):
        value = getattr(strategy, entry.name)
        if isinstance(value, tuple) and entry.metadata.get("kind"):
            spec[entry.name] = [spec_of(item) for item in cast("tuple[Any, ...]", value)]
        else:
            spec[entry.name] = spec_of(value) if _is_strategy(value) else value
    return spec


def _is_strategy(value: Any) -> bool:
    named = isinstance(getattr(value, "name", None), str)
    return named and is_dataclass(value) and not isinstance(value, type)
