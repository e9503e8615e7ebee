"""Sweeps: `--axis NAME=VALUES`, and prompt lines for every combination.

VALUES: `a,b,c` (`\\,` is a comma), `1..10`, `1..10:2`, `0..1#5` (5 evenly spaced). NAME: a column
of prompt files (`steps`, `guidance`, `guidance.scale`, `input.strength`), or `prompt/cat`, which
replaces the text "cat" in the prompt by each value.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sampler import registry
from sampler.core.errors import SamplerError, UsageError
from sampler.runs.cells import scalar
from sampler.runs.lines import COLUMNS, INPUT
from sampler.runs.readers import RawLine

MAX_VALUES = 10_000
_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::({_NUMBER})|#(\d{{1,6}}))?$")
_TEXT_COLUMNS = ("prompt", "negative_prompt", "tag")
REPLACE = "prompt/"


@dataclass(frozen=True)
class Axis:
    """Name and values of an axis, in order."""

    name: str
    values: tuple[Any, ...]


def parse_axis(text: str) -> Axis:
    """Parse `NAME=VALUES`. Raises UsageError."""
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals or not name or not values:
        raise UsageError(f"--axis takes NAME=VALUES, not {text!r:.60}.")
    column = name.partition(".")[0]
    is_input = name.startswith(INPUT) and name != INPUT
    if (
        column not in COLUMNS
        and not is_input
        and not (name.startswith(REPLACE) and name != REPLACE)
    ):
        known = [*COLUMNS, "guidance.scale", "sampler.order", "prompt/TEXT"]
        raise UsageError(f"--axis {name!r:.60}: unknown name{registry.suggestion(name, known)}.")
    is_text = column in _TEXT_COLUMNS or name.startswith(REPLACE)
    found = _split(values) if is_text else _values(values, name)
    if twice := [value for k, value in enumerate(found) if value in found[:k]]:
        raise UsageError(f"--axis {name}: the value {twice[0]!r:.60} is given twice.")
    return Axis(name, tuple(found))


def sweep(lines: Iterable[RawLine], axes: list[Axis]) -> Iterator[RawLine]:
    """Yield every line with every combination of values; the last axis varies fastest.

    Raises UsageError for an axis that is given twice, and for a text to replace that a prompt does
    not hold.
    """
    names = [axis.name for axis in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--axis {twice[0]:.60} is given twice.")
    for line in lines:
        if isinstance(line.cells, SamplerError):
            yield line
            continue
        for values in itertools.product(*(axis.values for axis in axes)):
            cell = dict(zip(names, values, strict=True))
            yield line._replace(cells=_changed(line.cells, cell, line.where), axes=cell)


def _changed(cells: Mapping[str, Any], values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Cells of a line with these values; all texts are replaced at once, in its own prompt."""
    changed = dict(cells)
    replaced = {n.removeprefix(REPLACE): v for n, v in values.items() if n.startswith(REPLACE)}
    changed.update({n: v for n, v in values.items() if not n.startswith(REPLACE)})
    prompt = str(changed.get("prompt", ""))
    if missing := [text for text in replaced if text not in prompt]:
        raise UsageError(f"{where}: --axis prompt/{missing[0]:.60}: not in the prompt.")
    if replaced:
        pattern = "|".join(re.escape(text) for text in sorted(replaced, key=len, reverse=True))
        changed["prompt"] = re.sub(pattern, lambda match: str(replaced[match[0]]), prompt)
    return changed


def _values(text: str, name: str) -> list[Any]:
    found: list[Any] = []
    for part in _split(text):
        match = _RANGE.match(part.strip())
        found += _range(match, name) if match else [scalar(part.strip())]
    if len(found) > MAX_VALUES:
        raise UsageError(f"--axis {name}: more than {MAX_VALUES} values.")
    return found


def _range(match: re.Match[str], name: str) -> list[Any]:
    """Values of a range, ends included; integers stay integers, others are rounded to 12 digits."""
    first, last = float(match[1]), float(match[2])
    integers = all(re.fullmatch(r"-?\d+", match[i] or "1") for i in (1, 2, 3))
    if match[4]:
        count = int(match[4])
        if not 2 <= count <= MAX_VALUES:
            raise UsageError(f"--axis {name}: A..B#N needs N from 2 to {MAX_VALUES}.")
        step, integers = (last - first) / (count - 1), False
    else:
        step = float(match[3] or 1) * (1 if last >= first else -1)
        if step * (last - first) < 0 or step == 0 or not math.isfinite(step):
            raise UsageError(
                f"--axis {name}: {match[0]:.60} never reaches its end; use a step > 0."
            )
        steps = (last - first) / step
        if not steps < MAX_VALUES:
            raise UsageError(f"--axis {name}: more than {MAX_VALUES} values.")
        count = int(steps + 1e-9) + 1
    values = [float(f"{first + k * step:.12g}") for k in range(count)]
    return [int(value) for value in values] if integers else values


def _split(text: str) -> list[str]:
    """Split at commas; `\\,` is a comma."""
    parts = re.split(r"(?<!\\),", text)
    return [part.replace("\\,", ",").strip() for part in parts]
