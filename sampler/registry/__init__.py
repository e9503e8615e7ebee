"""Names for strategies, for configuration files, the command line and third parties.

In Python one passes an instance; a name, or {"name": ..., field: ...}, does the same.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

from sampler.registry.constraints import check_fields, on_construction
from sampler.registry.instances import spec_of as spec_of
from sampler.registry.instances import with_defaults as with_defaults
from sampler.registry.ranges import hints, words

T = TypeVar("T", bound=type)

# kind -> (package whose import registers our own, entry-point group of third parties)
KINDS = {
    "sampler": ("sampler.samplers", "sampler.samplers"),
    "guidance": ("sampler.guidance", "sampler.guidance"),
    "reward": ("sampler.rewards", "sampler.rewards"),
    "trainer": ("sampler.training", "sampler.trainers"),
}

# Method by which an object is recognised as a strategy of a kind.
_METHOD = {"sampler": "step", "guidance": "combine", "reward": "__call__", "trainer": "updates"}


R = TypeVar("R", bound=Callable[[Mapping[str, Any]], Mapping[str, Any]])
_resolvers: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {}
_registered: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: registers a frozen dataclass as `name` of this kind.

    Its fields are checked against their annotations (`registry.constraints`) at construction, and a
    field that holds a strategy, or a list of them (its metadata names the kind), is built.
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
        if not is_dataclass(cast(Any, cls)):
            raise ValueError(f"The {kind} {name!r} must be a (frozen) dataclass.")
        cls.name = name  # pyright: ignore[reportAttributeAccessIssue]
        table[name] = cls if known is cls else on_construction(_complete)(cls)
        return cls

    return add


def resolver(kind: str) -> Callable[[R], R]:
    """Decorator of the function that turns specs with unknown names into ours, or leaves them."""

    def add(function: R) -> R:
        _resolvers[kind] = function
        return function

    return add


def names(kind: str) -> list[str]:
    """The names of a kind: ours in their order of import, then third parties'."""
    table = _load(kind)
    return [*table, *sorted(set(_plugins(kind)) - set(table))]


def exists(kind: str, name: str) -> bool:
    """Return True for a name of a kind; third parties' are read for names that are not ours."""
    return name in _load(kind) or name in _plugins(kind)


def lookup(kind: str, name: str) -> type:
    """The class of a name. Raises ValueError that suggests a similar name."""
    table = _load(kind)
    if name not in table and name in _plugins(kind):
        entry = _plugins(kind)[name]
        try:
            table[name] = register(kind, name)(entry.load())
        except Exception as error:
            where = entry.dist.name if entry.dist else "an unknown distribution"
            raise ValueError(f"The {kind} {name!r} of {where} failed to load: {error}") from error
    if name not in table:
        raise ValueError(f"Unknown {kind} {name!r}{suggestion(name, names(kind))}.")
    return table[name]


def build(kind: str, spec: Any) -> Any:
    """An instance from a name, from {"name": ..., field: ...}, or the instance itself.

    Raises ValueError that names the wrong field, what is allowed and a similar name.
    """
    # Instances first: the loop calls this at every step.
    if not isinstance(spec, (str, Mapping, type)) and hasattr(spec, _METHOD.get(kind, "")):
        return with_defaults(kind, spec)
    table_of = _load(kind)
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        known = ", ".join(table_of)
        raise ValueError(
            f"A {kind} is a name, a mapping with 'name', or an instance, not {spec!r:.60}; "
            f"names: {known}."
        )
    given = dict(cast("Mapping[Any, Any]", spec))
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"A {kind} mapping needs 'name', one of {', '.join(names(kind))}.")
    if name not in table_of and kind in _resolvers:
        resolved = dict(_resolvers[kind]({"name": name, **given}))
        name, given = resolved.pop("name"), resolved
    cls = lookup(kind, name)
    allowed = {f.name: f for f in fields(cls) if f.init}
    for key in given:
        if key not in allowed:
            raise ValueError(
                f"{kind} {name!r} has no field {key!r}{suggestion(str(key), allowed)}."
            )
    for key, entry in allowed.items():
        if key not in given and _is_required(entry):
            raise ValueError(f"{kind} {name!r} needs the field {key!r}.")
    return with_defaults(kind, cls(**given))


def _complete(strategy: Any) -> None:
    """Builds the strategies in the fields of a new one, and checks its other fields."""
    nested = [f for f in fields(strategy) if f.metadata.get("kind")]
    for entry in nested:
        value, kind = getattr(strategy, entry.name), entry.metadata["kind"]
        if isinstance(value, (list, tuple)):
            built = tuple(build(kind, item) for item in cast("Sequence[Any]", value))
        else:
            built = None if value is entry.default is None else build(kind, value)
        object.__setattr__(strategy, entry.name, built)
    check_fields(strategy, strategy.name, skip=[f.name for f in nested])


def _is_required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def describe(kind: str, name: str) -> dict[str, Any]:
    """Summary, docstring, reference and fields of a strategy.

    Each field has name, type, default and range, in words: "from 0 to 1", "" for any value.
    """
    cls = lookup(kind, name)
    text = (cls.__doc__ or "").strip()
    types, plain = hints(cls), get_type_hints(cls)
    return {
        "kind": kind,
        "name": name,
        "summary": text.splitlines()[0] if text else "",
        "doc": text,
        "reference": getattr(cls, "reference", ""),
        "fields": [
            {
                "name": f.name,
                "type": inspect.formatannotation(plain[f.name]),
                "default": _default(f),
                "range": words(types[f.name]),
            }
            for f in fields(cls)
            if f.init
        ],
    }


def suggestion(name: str, known: Iterable[str]) -> str:
    """Suffix for an error message: did-you-mean, or all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(known)}"


def _default(entry: Field[Any]) -> Any:
    if entry.default is not MISSING:
        return entry.default
    return None if entry.default_factory is MISSING else entry.default_factory()


def _table(kind: str) -> dict[str, type]:
    if kind not in _registered:
        raise ValueError(f"Unknown kind {kind!r}{suggestion(kind, KINDS)}.")
    return _registered[kind]


def _load(kind: str) -> dict[str, type]:
    table = _table(kind)
    importlib.import_module(KINDS[kind][0])
    return table


@cache
def _plugins(kind: str) -> dict[str, Any]:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return {entry.name: entry for entry in entry_points(group=KINDS[kind][1])}
