"""Ranges of fields, declared in their annotations and checked when an instance is made.

    scale: Annotated[float, Ge(0), DocInfo("1 is no guidance")] = 7.5

    CFG(scale=-1)
    ValueError: cfg: scale = -1 must be a number of at least 0 (1 is no guidance).

Constraints are those of `annotated_types`: Ge, Gt, Le, Lt, Predicate. Numbers are finite. `DocInfo`
is a remark on the range; for a `Predicate`, which has no words of its own, it is the range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import cache, wraps
from math import isfinite
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeVar,
    cast,
    get_args,
)

from annotated_types import Ge, Gt, Le

from sampler.registry.ranges import allowed, hints

if TYPE_CHECKING:
    from torch import Tensor

    FloatOrTensor = float | Tensor
else:  # torch is not imported for the sake of an annotation
    FloatOrTensor = float

T = TypeVar("T", bound=type)

Fraction = Annotated[float, Ge(0), Le(1)]
Nonnegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]


class PerSample:
    """Marks a number that may also be a tensor [B] with one value per sample."""


def checked(name: str) -> Callable[[T], T]:
    """Class decorator that checks the fields of new instances; `name` is used in errors."""
    return on_construction(lambda instance: check_fields(instance, name))


def on_construction(check: Callable[[Any], None]) -> Callable[[T], T]:
    """Class decorator: calls `check(instance)` before `__post_init__` of every new instance."""

    def add(cls: T) -> T:
        after = getattr(cls, "__post_init__", None)
        if after is None:
            create: Any = cls.__init__

            @wraps(create)
            def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
                create(self, *args, **kwargs)
                check(self)

            cls.__init__ = __init__
        else:

            @wraps(after)
            def __post_init__(self: Any, *args: Any) -> None:
                check(self)
                after(self, *args)

            cls.__post_init__ = __post_init__  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return add


def check_fields(instance: Any, name: str, skip: Iterable[str] = ()) -> None:
    """Checks the fields of a dataclass against their annotations; lists become tuples.

    Defaults are not checked. Raises ValueError that names `name`, the field, its value and range.
    """
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        if value is entry.default or not entry.init or entry.name in skip:
            continue
        checked = checked_value(instance.__class__, entry.name, value, name)
        if checked is not value:
            object.__setattr__(instance, entry.name, checked)


def checked_value(cls: type, field: str, value: Any, name: str) -> Any:
    """Convert the value of a field to its annotated type. Raises ValueError as `check_fields`."""
    from pydantic import ValidationError

    hint, adapter = _adapters(cls)[field]
    if _is_tensor(value) and _has(hint, PerSample):
        given = value.detach()
        for extreme in (given.min().item(), given.max().item()):
            checked_value(cls, field, extreme, name)
        return value
    if "tuple" in str(hint):
        value = _tuples(value)  # files hold lists only
    else:
        value = _plain(value)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        what = allowed(hint)
        if any(problem["type"] == "finite_number" for problem in error.errors()):
            what = what.replace("a number", "a finite number")
        raise ValueError(f"{name}: {field} = {value!r:.60} must be {what}.") from None


def as_int(value: Any, name: str) -> int:
    """Convert an integer of Python, NumPy or torch; a float must have no fraction.

    Raises ValueError that names the argument.
    """
    number = _plain(value)
    whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
    if not whole or isinstance(number, bool):
        raise ValueError(f"{name} = {value!r:.60} must be an integer.")
    return int(number)


def as_float(value: Any, name: str) -> float:
    """Convert a finite number of Python, NumPy or torch; ValueError that names the argument."""
    number = _plain(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not isfinite(number):
        raise ValueError(f"{name} = {value!r:.60} must be a number.")
    return float(number)


def _plain(value: Any) -> Any:
    """Value of a NumPy or torch scalar."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


@cache
def _adapters(cls: type) -> dict[str, tuple[Any, Any]]:
    """{field: (its type, its validator)}."""
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    known = hints(cls)
    return {
        entry.name: (known[entry.name], TypeAdapter(known[entry.name], config=config))
        for entry in fields(cls)
    }


def _has(hint: Any, marker: type) -> bool:
    return any(part is marker or _has(part, marker) for part in get_args(hint))


def _tuples(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(map(_tuples, cast("Sequence[Any]", value)))


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"
