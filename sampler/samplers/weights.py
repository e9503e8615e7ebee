"""Weights of RED-Diff's prior over the noise levels, and its published timesteps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

Weight = Literal["linear", "sqrt", "square", "log", "trunc_linear", "power2over3", "const"]

# g(q)/q with q = sigma/alpha: what the residual x0 − x0_hat is multiplied with.
WEIGHTS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda q: 1.0,
    "sqrt": lambda q: q**-0.5,
    "square": lambda q: q,
    "log": lambda q: math.log1p(q) / q if math.isfinite(q) else 0.0,
    "trunc_linear": lambda q: min(q, 1) / q,
    "power2over3": lambda q: q ** (-1 / 3),
    "const": lambda q: 1 / q,
}


def published_times(steps: int, start: int = 1000, end: int = 0) -> list[int]:
    """The timesteps of the published loop, descending; more than asked for (12 gives 13).

    Levels of these, then a last one at sigma = 0, make a run of REDDiff the published loop.
    """
    return list(range(end, start, (start - end) // steps))[::-1]
