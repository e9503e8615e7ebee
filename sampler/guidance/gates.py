"""Limits on the steps at which a rule guides: an interval of noise levels, a window of steps.

    interval (low, high]: on where low < sigma/alpha <= high (sigma/alpha is the EDM sigma)
    window [first, last): on for the steps first, ..., last − 1, counted from the start of the run

Outside, a rule returns the conditional prediction and requests that evaluation only.
Reference: Applying Guidance in a Limited Interval (Kynkäänniemi et al., 2024), arXiv:2404.07724.
The step window is the setting of diffusers' guiders, and with first = 0 it is Step AG
(arXiv:2506.08351): guidance for the first steps only.
"""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import DocInfo, Ge, Predicate

from sampler.registry.constraints import FloatOrTensor, PerSample
from sampler.types import Level, Span


def _ascends(pair: tuple[float, float]) -> bool:
    return 0 <= pair[0] < pair[1]


def _is_window(pair: tuple[int, int]) -> bool:
    return 0 <= pair[0] <= pair[1]


def _spares_the_batch(axes: tuple[int, ...]) -> bool:
    return bool(axes) and 0 not in axes


Scale = Annotated[FloatOrTensor, Ge(0), PerSample, DocInfo("1 is no guidance")]
Strength = Annotated[FloatOrTensor, Ge(0), PerSample, DocInfo("0 is no guidance")]
Interval = Annotated[
    tuple[float, float],
    Predicate(_ascends),
    DocInfo("(low, high) with 0 <= low < high, in sigma/alpha"),
]
Window = Annotated[
    tuple[int, int],
    Predicate(_is_window),
    DocInfo("(first, last) with 0 <= first <= last, in steps"),
]
Axes = Annotated[
    tuple[int, ...], Predicate(_spares_the_batch), DocInfo("dimensions other than 0, at least one")
]


def inside(interval: Interval | None, level: Level) -> bool:
    """Return whether low < sigma/alpha <= high; without an interval, always."""
    if interval is None:
        return True
    sigma = level.sigma / level.alpha if level.alpha else math.inf
    return interval[0] < sigma <= interval[1]


def active(interval: Interval | None, window: Window | None, span: Span) -> bool:
    """Return whether a rule with this interval and this window guides at this step."""
    if window is not None and not window[0] <= span.index < window[1]:
        return False
    return inside(interval, span.now)


def is_one(scale: FloatOrTensor) -> bool:
    """True for the number 1, which means no guidance: its branch is not evaluated."""
    return isinstance(scale, (int, float)) and math.isclose(scale, 1, rel_tol=1e-9)


def is_zero(scale: FloatOrTensor) -> bool:
    """True for the number 0, which means the unconditional model alone."""
    return isinstance(scale, (int, float)) and scale == 0
