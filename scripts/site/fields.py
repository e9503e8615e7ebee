"""Fields and settings of strategies as they stand in the reference: types, defaults, specs."""

from __future__ import annotations

import typing
from typing import Any, Literal

import yaml


def plain(spec: Any) -> str:
    """A spec as it is written in a configuration file, in one line; a bare name by itself."""
    if isinstance(spec, dict) and list(spec) == ["name"]:
        return spec["name"]
    return yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=1000).split("\n")[0]


def value(given: Any) -> str:
    """A default for a table cell: text as it is, lists and specs as YAML has them."""
    if isinstance(given, bool) or given is None:
        return str(given)
    return given if isinstance(given, str) else plain(list(given) if _many(given) else given)


def _many(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def type_name(kind: Any) -> str:
    """A type for a table cell: choices are listed, unions said in words."""
    if typing.get_origin(kind) is Literal:
        return " ".join(f"`{value}`" for value in typing.get_args(kind))
    if kind is type(None):
        return "`None`"
    if kind is Any:
        return "any"
    parts = typing.get_args(kind)
    if typing.get_origin(kind) in (tuple, list) or not parts:
        names = ", ".join(
            "..." if part is ... else getattr(part, "__name__", "any") for part in parts
        )
        return f"`{kind.__name__}[{names}]`" if parts else f"`{kind.__name__}`"
    return " or ".join(type_name(part) for part in parts)
