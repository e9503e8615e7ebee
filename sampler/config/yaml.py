"""A strict subset of YAML for configuration files.

Only `true` and `false` are booleans, `1e-4` is a number, `1:30` and `2026-01-31` are text.
Duplicate keys, tags, merge keys, keys that are not text, and numbers that are not finite are
errors, and so is a file beyond the limits below. Every error names the line.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from sampler.core.errors import SamplerError, UsageError

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_ALIASES = 100

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar types of this module's docstring."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


_Loader.add_implicit_resolver(f"{_PREFIX}bool", re.compile(r"(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(f"{_PREFIX}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_PREFIX}float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(f"{_PREFIX}null", re.compile(r"(null|~|)$"), ["n", "~", ""])


def parse(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """(value, line of each key path) of one YAML document.

    name: the text's name in errors ("cfg.yaml"). Raises UsageError: `name:line: problem`.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UsageError(f"{name}: the file is larger than 1 MiB.")
    lines: dict[Path, int] = {}
    try:
        _check_limits(text, name)
        node = yaml.compose(text, Loader=_Loader)
        return (None if node is None else _value(node, (), lines, name)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.problem and "'\\t'" in error.problem:
            raise _error(name, mark, "a tab cannot indent; use spaces") from None
        parts = [part for part in (error.context, error.problem) if part]
        raise _error(name, mark, " ".join(", ".join(parts).split()) or "no YAML") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: {' '.join(str(error).split())}.") from None


def _check_limits(text: str, name: str) -> None:
    """Refuse oversized and tagged input from its events, before any value is built."""
    depth = nodes = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if not isinstance(event, yaml.NodeEvent):
            continue
        nodes += 1
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        if nodes > MAX_NODES or depth > MAX_DEPTH or aliases > MAX_ALIASES:
            limits = f"{MAX_NODES} values, depth {MAX_DEPTH}, {MAX_ALIASES} aliases"
            raise _error(name, event.start_mark, f"the file is too large; limits: {limits}")
        if getattr(event, "tag", None):
            raise _error(name, event.start_mark, "tags (!) are not allowed")


def _value(node: Node, path: Path, lines: dict[Path, int], name: str, budget: Any = None) -> Any:
    """Plain value of a node; every expansion of an alias counts against the node limit."""
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or len(path) > MAX_DEPTH:
        raise _error(name, node.start_mark, "aliases make the file too large or endless")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, SequenceNode):
        return [_value(item, (*path, i), lines, name, budget) for i, item in enumerate(node.value)]
    if not isinstance(node, MappingNode):
        return _scalar(node, name)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode) or not key_node.tag.endswith(":str"):
            raise _error(name, key_node.start_mark, "a key must be text")
        key = key_node.value
        if key in mapping:
            raise _error(name, key_node.start_mark, f"the key {key!r} is given twice")
        lines[(*path, key)] = key_node.start_mark.line + 1
        mapping[key] = _value(value_node, (*path, key), lines, name, budget)
    return mapping


def _scalar(node: Any, name: str) -> Any:
    text, kind = node.value, node.tag.removeprefix(_PREFIX)
    if kind == "null":
        return None
    if kind == "bool":
        return text == "true"
    if kind == "int":
        if len(text) > 40:
            raise _error(name, node.start_mark, "the number has more than 40 digits")
        return int(text)
    if kind == "float":
        number = math.nan if text[-1] in "fFnN" else float(text)
        if not math.isfinite(number):
            raise _error(name, node.start_mark, f"{text} is not a finite number")
        return number
    return text


def _error(name: str, mark: Any, problem: str) -> SamplerError:
    where = name if mark is None else f"{name}:{mark.line + 1}"
    return UsageError(f"{where}: {problem}.")
