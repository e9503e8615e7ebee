"""Parse configuration files in YAML, TOML and JSON to plain values and the line of every key.

All three have the limits of `sampler.config.yaml`; non-finite numbers, duplicate keys, dates and
other types are errors that name the file and, where it is known, the line.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from typing import Any

from sampler.config import yaml as strict_yaml
from sampler.core.errors import SamplerError, UsageError

KINDS = (".yaml", ".yml", ".toml", ".json")
Lines = dict[strict_yaml.Path, int]

_HEADER = re.compile(r"\s*\[([\w.\-]+)\]\s*(?:#.*)?$")
_KEY = re.compile(r"\s*([\w.\-]+)\s*=")


def parse(text: str, name: str, kind: str) -> tuple[Any, Lines]:
    """(tree, line of each key path) of a file's text; kind: ".toml", ".json", else YAML.

    Raises UsageError: `name:line: problem`.
    """
    if kind not in (".toml", ".json"):
        return strict_yaml.parse(text, name)
    if len(text.encode("utf-8", "surrogatepass")) > strict_yaml.MAX_BYTES:
        raise UsageError(f"{name}: the file is larger than 1 MiB.")
    try:
        tree, lines = _toml(text, name) if kind == ".toml" else _json(text, name)
    except RecursionError:
        raise UsageError(f"{name}: nested more than {strict_yaml.MAX_DEPTH} deep.") from None
    _check(tree, name)
    return tree, lines


def _toml(text: str, name: str) -> tuple[Any, Lines]:
    try:
        tomllib = importlib.import_module("tomllib")
    except ModuleNotFoundError:
        raise UsageError(f"{name}: TOML needs Python 3.11 or newer; write YAML.") from None
    try:
        tree = tomllib.loads(text)
    except ValueError as error:
        found = re.search(r"at line (\d+)", str(error))
        line = found[1] if found else text.count("\n") + 1
        problem = " ".join(str(error).partition(" (at ")[0].split())
        raise UsageError(f"{name}:{line}: {problem[0].lower()}{problem[1:]}.") from None
    lines: Lines = {}
    table: strict_yaml.Path = ()
    for number, line in enumerate(text.split("\n"), 1):
        if found := _HEADER.match(line):
            table = tuple(found[1].split("."))
            lines.setdefault(table, number)
        elif found := _KEY.match(line):
            lines.setdefault((*table, *found[1].split(".")), number)
    return tree, lines


def _json(text: str, name: str) -> tuple[Any, Lines]:
    try:
        tree = json.loads(text, parse_constant=no_constant, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name}:{error.lineno}: {error.msg.lower()}.") from None
    except ValueError as error:
        raise UsageError(f"{name}: {error}.") from None
    try:  # JSON is YAML except for tabs, which JSON strings escape
        return tree, strict_yaml.parse(text.replace("\t", " "), name)[1]
    except SamplerError:
        return tree, {}


def _check(tree: Any, name: str) -> None:
    """Raises UsageError beyond the limits, and for values that YAML does not have."""
    left, nodes = [(tree, 1)], 0
    while left:
        value, depth = left.pop()
        nodes += 1
        if depth > strict_yaml.MAX_DEPTH or nodes > strict_yaml.MAX_NODES:
            raise UsageError(f"{name}: too deep, or too many values.")
        if isinstance(value, dict):
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            left += [(inner, depth + 1) for inner in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name}: {value} is not a finite number.")
        elif not isinstance(value, (str, int, float, bool, type(None))):
            raise UsageError(f"{name}: {value!s:.40} is a date; write it as text.")


def no_constant(text: str) -> Any:
    """Refuse NaN and infinity (`parse_constant` of `json.loads`)."""
    raise ValueError(f"{text} is not a finite number")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys (`object_pairs_hook` of `json.loads`)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} is given twice")
    return found
