"""Weights of RED-Diff's prior over the noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

Weight = Literal["linear", "sqrt", "square", "log", "trunc_linear", "power2over3", "const"]

# g(q)/q with q = sigma/alpha: the factor of the residual x0 − x0_hat.
WEIGHTS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda q: 1.0,
    "sqrt": lambda q: q**-0.5,
    "square": lambda q: q,
    "log": lambda q: math.log1p(q) / q if math.isfinite(q) else 0.0,
    "trunc_linear": lambda q: min(q, 1) / q,
    "power2over3": lambda q: q ** (-1 / 3),
    "const": lambda q: 1 / q,
}
