"""Momentum numbers found by `sampler calibrate momentum`, looked up for the run at hand.

A file holds numbers for one model; each is good for one sampler, number of steps, rule with its
scale, and schedule. For any other the look-up refuses: a momentum number does not carry over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sampler.core.errors import UsageError
from sampler.types import Level

FORMAT = 2
NEAR = 1e-5  # six digits are stored, the last one open
BUNDLED = Path(__file__).parents[1] / "bundled" / "calibration" / "momentum.json"


class Key(NamedTuple):
    """Conditions that a calibrated number holds for; `schedule` is `schedule_key` of the levels."""

    sampler: str
    steps: int
    guidance: str
    scale: float
    schedule: str

    def __str__(self) -> str:
        return f"{self.sampler} at {self.steps} steps with {self.guidance} at scale {self.scale:g}"


def calibration_key(sampler: str, levels: Sequence[Level], guidance: Mapping[str, Any]) -> Key:
    """The key of a run over `levels`; the scale of a rule without one is 1."""
    rule: Any = guidance
    while isinstance(rule.get("rule"), Mapping):
        rule = rule["rule"]
    scale = rule.get("scale")
    name = str(guidance["name"])
    steps = len(levels) - 1
    return Key(sampler, steps, name, 1.0 if scale is None else float(scale), schedule_key(levels))


def schedule_key(levels: Sequence[Level]) -> str:
    """A grid as text: alpha and sigma of its levels, to six digits; see `same`."""
    return " ".join(f"{level.alpha:.6g} {level.sigma:.6g}" for level in levels)


def same(fitted: Key, found: Key) -> bool:
    """Return whether two keys agree, levels to the rounding of float32 schedules."""
    if fitted[:-1] != found[:-1]:
        return False
    one, other = fitted.schedule.split(), found.schedule.split()
    return len(one) == len(other) and all(
        math.isclose(float(a), float(b), rel_tol=NEAR, abs_tol=NEAR)
        for a, b in zip(one, other, strict=True)
    )


def look_up(spec: str, fingerprint: str, key: Key) -> float:
    """The number of "calibrated:FILE" (or "calibrated:bundled") for a model and a run.

    Raises SamplerError (2) for a file that cannot be read, another model, and a setting that was
    not calibrated.
    """
    name = spec.partition(":")[2]
    path = BUNDLED if name == "bundled" else Path(name).expanduser()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        known = [
            (Key(*(entry[field] for field in Key._fields)), entry) for entry in stored["entries"]
        ]
        model, version = stored["model"], stored["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a readable momentum calibration: "
            f"{getattr(error, 'strerror', None) or error}.",
        ) from None
    if version != FORMAT:
        raise UsageError(
            f"{path} is of format {version}, and this version reads {FORMAT}; "
            "run `sampler calibrate momentum` again.",
        )
    if model != fingerprint:
        raise UsageError(
            f"{path} was calibrated for model {model}, not for this one ({fingerprint}); "
            "run `sampler calibrate momentum` for it.",
        )
    number = next((entry["momentum_number"] for k, entry in known if same(k, key)), None)
    if number is None:
        there = "; ".join(str(k) for k, _ in known)
        raise UsageError(
            f"{path} has no momentum number for {key} on this schedule; it has {there}."
        )
    return float(number)
