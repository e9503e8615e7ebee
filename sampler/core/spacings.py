"""Specifications of grids: a name with settings, numbers, or a calibrated file."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

from sampler.core.named_grids import AYS
from sampler.core.ramps import RAMPS

_NUMBERS = re.compile(r"[-+.\deE]*\d[-+.\deE]*(\s*,\s*[-+.\deE]*\d[-+.\deE]*)*")
MOST_SIGMA = 200  # a list of numbers that starts above it holds timesteps


NAMES = ("simple", "sgm_uniform", "normal", "ddim_uniform", "beta", *RAMPS, *AYS)
_FIELDS: Mapping[str, Mapping[str, float]] = {
    "karras": {"rho": 7.0},
    "polyexponential": {"rho": 1.0},
    "beta": {"alpha": 0.6, "beta": 0.6},
    "beta_sigmas": {"alpha": 0.6, "beta": 0.6},
}


def options_of(name: str, given: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the settings of a named grid with their defaults.

    Raises ValueError for a setting that it does not have, and for one that is not above 0.
    """
    known = {"exponential": {"rho": 1.0}, **_FIELDS}.get(name, {})
    for key, value in (given or {}).items():
        allowed = _FIELDS.get(name, {})
        if key not in allowed:
            has = f"has {', '.join(allowed)}" if allowed else "has no settings"
            raise ValueError(f"grid: {name!r} has no setting {key!r:.60}; it {has}.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise ValueError(f"grid: {key} = {value!r:.60} of {name!r} must be a number above 0.")
    return {**known, **(given or {})}


class Listed(NamedTuple):
    """Levels given as numbers; unit: "sigmas" (noise), "timesteps", or "times" before the shift."""

    unit: str
    values: tuple[float, ...]


class Named(NamedTuple):
    """A grid by name, with its settings."""

    name: str
    options: dict[str, float]


class Calibrated(NamedTuple):
    """A grid in a file of `sampler calibrate grid`, looked up by `calibrated_grid.grid_of`."""

    path: str


def parsed(spec: Any) -> Listed | Named | Calibrated:
    """Read the specification of a grid.

    spec: a name, {"name": ..., setting: ...}, numbers (also as text), {UNIT: numbers}, or
    "calibrated:FILE". A 0 at the end of numbers is left out: it is the end of every run.
    Numbers alone are timesteps if the first one is above 200, else sigmas.

    Raises ValueError for anything else.
    """
    if isinstance(spec, str) and spec.startswith("calibrated:"):
        return Calibrated(spec.removeprefix("calibrated:"))
    if isinstance(spec, str):
        numbers = _NUMBERS.fullmatch(spec.strip())
        spec = {"name": spec} if numbers is None else [float(v) for v in spec.split(",")]
    if isinstance(spec, Mapping):
        given = cast("Mapping[Any, Any]", spec)
        if len(given) == 1 and (unit := next(iter(given))) in ("sigmas", "timesteps", "times"):
            return _listed(unit, given[unit])
        options = {key: value for key, value in given.items() if key != "name"}
        name = given.get("name")
        if name not in NAMES:
            hint = f" (did you mean {close[0]!r}?)" if (close := _close(name)) else ""
            raise ValueError(
                f"grid: {name!r:.60} is not known{hint}; use one of {', '.join(NAMES)}, or "
                "{'sigmas': [...]}, {'timesteps': [...]} or {'times': [...]}."
            )
        return Named(name, options_of(name, options))
    if isinstance(spec, Sequence):
        return _listed("", spec)
    raise ValueError(f"grid: {spec!r:.60} must be a name, a mapping with 'name', or numbers.")


def count_of(spec: Any) -> int | None:
    """Number of steps of a grid that lists its levels, None for others."""
    found = None if spec is None else parsed(spec)
    return len(found.values) if isinstance(found, Listed) else None


def _listed(unit: str, values: Any) -> Listed:
    many = isinstance(values, Sequence) and not isinstance(values, str)
    numbers: list[Any] = list(cast("Sequence[Any]", values)) if many else [values]
    for value in numbers:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value < 0:
            raise ValueError(f"grid: {value!r:.60} must be a number of at least 0.")
    found = tuple(float(v) for v in numbers)
    found = found[:-1] if found and found[-1] == 0 else found
    if not found:
        raise ValueError("grid: a list needs at least one level above 0.")
    if bad := [(a, b) for a, b in pairwise(found) if b >= a]:
        raise ValueError(
            f"grid: {bad[0][1]:g} after {bad[0][0]:g}: the levels of a list must fall."
        )
    return Listed(unit or ("timesteps" if found[0] > MOST_SIGMA else "sigmas"), found)


def _close(name: Any) -> list[str]:
    return difflib.get_close_matches(str(name), NAMES, 1)
