"""Formatting of strategies' fields for the reference: types, defaults, specs."""

from __future__ import annotations

import typing
from typing import Any, Literal

import yaml


def plain(spec: Any) -> str:
    """Format a spec on one line, as in a configuration file; a bare name stays bare."""
    if isinstance(spec, dict) and list(spec) == ["name"]:
        return spec["name"]
    return yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=1000).split("\n")[0]


def value(given: Any) -> str:
    """Format a default for a table cell: text unquoted, lists and specs as YAML."""
    if isinstance(given, bool) or given is None:
        return str(given)
    return given if isinstance(given, str) else plain(list(given) if _many(given) else given)


def _many(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def type_name(kind: Any) -> str:
    """Format a type for a table cell: choices as a list, unions in words."""
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
