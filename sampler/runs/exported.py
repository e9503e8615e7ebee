"""Exported tables as prompt files: settings written by an export are read back unchanged.

Columns of results are left out when a table is read. Strategies have a column for each
field (`sampler.order`, `guidance.rule.scale`); an empty cell is a field that the strategy of the
row does not have, `null` a field without a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sampler.runs.cells import STRATEGIES, scalar

RESULTS = ("index", "key", "status", "file", "lines", "nfe", "ms", "warnings", "error")
AXIS = "axis_"
RESULTS_NOTE = (
    f"an exported table; its columns of results ({', '.join(RESULTS)}, {AXIS}NAME) are not read"
)
_MARK = {"index", "key", "status"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def is_exported(header: Iterable[str]) -> bool:
    """Check for the columns that every exported table begins with."""
    return set(header) >= _MARK


def settings_of_row(row: Mapping[str, str]) -> dict[str, str]:
    """Cells of an exported row that are settings, without the marks of `protected`."""
    return {
        name: cell[1:] if cell.startswith("'") and _is_formula(cell) else cell
        for name, cell in row.items()
        if name not in RESULTS and not name.startswith(AXIS)
    }


def protected(value: Any) -> Any:
    """Mark text that a spreadsheet would run as a formula, and text that has such a mark."""
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def _is_formula(text: str) -> bool:
    return text.lstrip("'").startswith(_FORMULA)


def strategy_columns(column: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (column, value) of a strategy's name and fields; rules inside have columns below."""
    yield column, spec["name"]
    for name, value in spec.items():
        if name == "name":
            continue
        if isinstance(value, Mapping) and "name" in value:
            yield from strategy_columns(f"{column}.{name}", value)
        else:
            yield f"{column}.{name}", value


def cell_of(column: str, value: Any) -> Any:
    """Text of a strategy's field, from which the same value is read; other values as they are."""
    if "." not in column or column.partition(".")[0] not in STRATEGIES:
        return value
    if isinstance(value, str) and scalar(value) == value:
        return value
    return json.dumps(value)
