"""Values of cells in files written by people, spreadsheets and pandas."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sampler.core.errors import UsageError

STRATEGIES = ("sampler", "guidance")
INTEGERS = ("seed", "n", "width", "height", "steps")
EXACT = 2**53  # up to here floats hold every integer
RANDOM_SEED = -1
_FLOAT = r"[-+]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][-+]?\d+)"  # not a plain integer


def scalar(text: Any) -> Any:
    """Parse a cell as number, true, false, null or list; anything else stays text."""
    if not isinstance(text, str) or len(text) > 1000:
        return text
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, dict) else value


def given(value: Any, key: str, where: str = "") -> Any:
    """Value of a column, with the conversions of pandas undone.

    Pandas writes 42.0 for 42 in columns with gaps, and null for what a setting of a strategy does
    not give. Raises UsageError for an integer column with a float above 2^53.
    """
    if key == "seed" and value == "random":
        return RANDOM_SEED
    if key in INTEGERS:
        return _whole(value, key, where)
    if key.partition(".")[0] not in STRATEGIES:
        return value
    if isinstance(value, Mapping):
        return {name: given(inner, key) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [given(inner, key) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        return int(value)  # fields of other types take integers as well
    return value


def _whole(value: Any, key: str, where: str) -> Any:
    """Convert 42.0 or "42.0" to 42; anything else is left to the check of the column."""
    if isinstance(value, str) and not re.fullmatch(_FLOAT, value.strip()):
        return value
    if not isinstance(value, (str, float)) or not math.isfinite(number := float(value)):
        return value
    if abs(number) > EXACT:
        raise UsageError(
            f"{where}: {key}: {value!s:.40} is a float above 2^53, where floats skip integers; "
            "write the integer, or make the column one of integers or text."
        )
    return int(number) if number.is_integer() else value
