"""Types and ranges of fields in words, for errors, listings and the documentation."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import DocInfo, Ge, Gt, Le, Lt, MaxLen, Predicate


@cache
def hints(cls: type) -> Mapping[str, Any]:
    """{field: type} of a dataclass, with the constraints."""
    return get_type_hints(cls, include_extras=True)


def without_none(hint: Any) -> Any:
    """The type of a value that is given, where None stands for one that is not."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return Union[tuple(part for part in get_args(hint) if part is not type(None))]  # noqa: UP007


def words(hint: Any) -> str:
    """Range of a type in words, "from 0 to 1 (0 is off)"; "" where every value is allowed."""
    if get_origin(hint) is Annotated:
        inner, *constraints = get_args(hint)
        remark = next((c.documentation for c in constraints if isinstance(c, DocInfo)), "")
        if any(isinstance(c, Predicate) for c in constraints):
            return remark
        bounds = _bounds(constraints) or words(inner)
        return f"{bounds} ({remark})" if remark and bounds else bounds or remark
    if get_origin(hint) is Literal:
        return ""
    parts = [words(part) for part in get_args(hint) if part is not ...]
    each = "each " if get_origin(hint) is tuple else ""
    return each + ", or ".join(part for part in dict.fromkeys(parts) if part) if any(parts) else ""


def _bounds(constraints: Iterable[Any]) -> str:
    found: dict[type, Any] = {type(c): c for c in constraints}
    low, high = found.get(Ge), found.get(Le)
    if low and high:
        return f"from {_number(low.ge)} to {_number(high.le)}"
    texts = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    return " and ".join(
        f"{text} {_number(getattr(found[kind], kind.__name__.lower()))}"
        for kind, text in texts.items()
        if kind in found
    ) + (f"at most {_number(found[MaxLen].max_length)} characters" if MaxLen in found else "")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value:g}"


def allowed(hint: Any) -> str:
    """Type and range in words, "an integer from 1 to 5"; a mapping for a dataclass."""
    if get_origin(hint) is Annotated:
        bounds = words(hint)
        if any(isinstance(c, Predicate) for c in get_args(hint)):
            return bounds
        noun = allowed(get_args(hint)[0])
        return f"{noun}{' of' * bounds.startswith('at ')} {bounds}" if bounds else noun
    if get_origin(hint) is Literal:
        *others, last = map(repr, get_args(hint))
        return (
            f"one of {', '.join([*others, last])}" if others[1:] else " or ".join([*others, last])
        )
    if get_origin(hint) in (Union, types.UnionType):
        return ", or ".join(allowed(part) for part in get_args(hint))
    if get_origin(hint) is dict or is_dataclass(hint):
        return "a mapping (key: value)"
    if get_origin(hint) is tuple:
        kind, *others = get_args(hint)
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        count = f"{1 + len(others)} " if ... not in others else ""
        bounds = f", {words(hint)}" if words(hint) else ""
        return f"a list of {count}{_NOUNS.get(kind, ('', 'values'))[1]}{bounds}"
    if hint in _NOUNS:
        return _NOUNS[hint][0]
    return inspect.formatannotation(hint)


_NOUNS = {
    float: ("a number", "numbers"),
    int: ("an integer", "integers"),
    str: ("a text", "texts"),
    bool: ("true or false", "flags"),
    type(None): ("None", "None"),
}
