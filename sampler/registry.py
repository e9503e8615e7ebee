"""Names for strategies, for configuration files, the command line and third parties.

In Python one passes an instance; a name, or {"name": ..., field: ...}, does the same.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T", bound=type)

# kind -> (package whose import registers our own, entry-point group of third parties)
KINDS = {
    "sampler": ("sampler.samplers", "sampler.samplers"),
    "guidance": ("sampler.guidance", "sampler.guidance"),
    "reward": ("sampler.rewards", "sampler.rewards"),
    "trainer": ("sampler.training", "sampler.trainers"),
}

# What an object must have to be taken for a strategy of the kind.
_METHOD = {"sampler": "step", "guidance": "combine", "reward": "__call__", "trainer": "updates"}

_registered: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: makes a frozen dataclass known as `name` of this kind.

    Raises ValueError for an unknown kind, and for a name that another class already has.
    """
    table = _table(kind)

    def add(cls: T) -> T:
        if not cls.__module__.startswith(f"{KINDS[kind][0]}."):
            _load(kind)  # ours first: a third party must not take one of our names
        known = table.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(f"The {kind} {name!r} is registered already, by {known.__module__}.")
        if not hasattr(cls, "__dataclass_fields__"):
            raise ValueError(f"The {kind} {name!r} must be a (frozen) dataclass.")
        cls.name = name  # pyright: ignore[reportAttributeAccessIssue]
        table[name] = cls
        return cls

    return add


def names(kind: str) -> list[str]:
    """The names of a kind: ours in their order of import, then third parties'."""
    table = _load(kind)
    return [*table, *sorted(set(_plugins(kind)) - set(table))]


def lookup(kind: str, name: str) -> type:
    """The class of a name. Raises ValueError that suggests the nearest name."""
    table = _load(kind)
    if name not in table and name in _plugins(kind):
        entry = _plugins(kind)[name]
        try:
            table[name] = register(kind, name)(entry.load())
        except Exception as error:
            where = entry.dist.name if entry.dist else "an unknown distribution"
            raise ValueError(f"The {kind} {name!r} of {where} failed to load: {error}") from error
    if name not in table:
        raise ValueError(f"Unknown {kind} {name!r}{nearest(name, names(kind))}.")
    return table[name]


def build(kind: str, spec: Any) -> Any:
    """An instance from a name, from {"name": ..., field: ...}, or the instance itself.

    A field that holds a strategy, or a list of them (its metadata names the kind), is built in the
    same way.
    Raises ValueError that names the wrong field, what is allowed and the nearest name.
    """
    # First, and without a look at the table: the loop comes here at every step.
    if not isinstance(spec, (str, Mapping, type)) and hasattr(spec, _METHOD.get(kind, "")):
        return spec
    table_of = _load(kind)
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        known = ", ".join(table_of)
        raise ValueError(
            f"A {kind} is a name, a mapping with 'name', or an instance, not {spec!r:.60}; "
            f"names: {known}."
        )
    if not isinstance(spec.get("name"), str):
        raise ValueError(f"A {kind} mapping needs 'name', one of {', '.join(names(kind))}.")
    cls = lookup(kind, spec["name"])
    allowed = {f.name: f for f in fields(cls) if f.init}
    given: dict[str, Any] = {}
    for key, value in spec.items():
        if key == "name":
            continue
        if key not in allowed:
            raise ValueError(
                f"{kind} {spec['name']!r} has no field {key!r}{nearest(str(key), allowed)}."
            )
        given[key] = _field_value(kind, cls, allowed[key], value)
    for key, entry in allowed.items():
        if key in given:
            continue
        if entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{kind} {spec['name']!r} needs the field {key!r}.")
        if entry.metadata.get("kind") and isinstance(entry.default, str):
            given[key] = build(entry.metadata["kind"], entry.default)
    return cls(**given)


def spec_of(strategy: Any) -> Any:
    """{"name": ..., field: ...} of an instance: `build` of it gives an equal instance.

    An object that is no dataclass stands for itself.
    """
    if not hasattr(strategy, "__dataclass_fields__"):
        return strategy
    cls: Any = type(strategy)
    spec: dict[str, Any] = {"name": cls.name}
    for entry in fields(cls):
        value = getattr(strategy, entry.name)
        if isinstance(value, tuple) and entry.metadata.get("kind"):
            spec[entry.name] = [spec_of(item) for item in value]
        else:
            spec[entry.name] = spec_of(value) if _is_strategy(value) else value
    return spec


def _is_strategy(value: Any) -> bool:
    return is_dataclass(value) and hasattr(value, "name") and not isinstance(value, type)


def describe(kind: str, name: str) -> dict[str, Any]:
    """Summary, fields with types and defaults, reference and the whole docstring of a strategy."""
    cls = lookup(kind, name)
    text = (cls.__doc__ or "").strip()
    return {
        "kind": kind,
        "name": name,
        "summary": text.splitlines()[0] if text else "",
        "doc": text,
        "reference": getattr(cls, "reference", ""),
        "fields": [
            {"name": f.name, "type": _type_name(f), "default": _default(f)}
            for f in fields(cls)
            if f.init
        ],
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest known name, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(known)}"


def _field_value(kind: str, cls: type, entry: Field[Any], value: Any) -> Any:
    nested = entry.metadata.get("kind")
    if nested and isinstance(value, (list, tuple)):
        return tuple(build(nested, item) for item in value)
    if nested:
        return None if value is None else build(nested, value)
    from pydantic import ValidationError

    try:
        return _checkers(cls)[entry.name].validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ValueError(
            f"{kind} {cls.name!r}: field {entry.name!r} = {value!r:.60}: "
            f"{problem[0].lower()}{problem[1:]}."
        ) from None


@cache
def _checkers(cls: type) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter

    hints = get_type_hints(cls)
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    lists = {"tuple"}  # YAML and JSON have lists only: tuples are checked leniently
    return {
        f.name: TypeAdapter(
            hints[f.name],
            config=ConfigDict(allow_inf_nan=False)
            if any(word in str(hints[f.name]) for word in lists)
            else config,
        )
        for f in fields(cls)
    }


def _type_name(entry: Field[Any]) -> str:
    return entry.type if isinstance(entry.type, str) else getattr(entry.type, "__name__", "Any")


def _default(entry: Field[Any]) -> Any:
    if entry.default is not MISSING:
        return entry.default
    return None if entry.default_factory is MISSING else entry.default_factory()


def _table(kind: str) -> dict[str, type]:
    if kind not in _registered:
        raise ValueError(f"Unknown kind {kind!r}{nearest(kind, KINDS)}.")
    return _registered[kind]


def _load(kind: str) -> dict[str, type]:
    table = _table(kind)
    importlib.import_module(KINDS[kind][0])
    return table


@cache
def _plugins(kind: str) -> dict[str, Any]:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return {entry.name: entry for entry in entry_points(group=KINDS[kind][1])}
