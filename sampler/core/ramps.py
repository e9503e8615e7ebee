"""Ramps of noise: n levels from the most of a model to the least, by a formula for each name.

A ramp is a function of (lo, hi, n, settings); the formulas are in the table of `spacings.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Ramp = Callable[[float, float, int, Mapping[str, float]], list[float]]


def _shares(n: int) -> list[float]:
    step = 1 / (n - 1)  # as np.linspace has them
    return [*(i * step for i in range(n - 1)), 1.0]


def karras(low: float, high: float, n: int, options: Mapping[str, float]) -> list[float]:
    """Karras et al. (2022), arXiv:2206.00364, eq. 5."""
    power = 1 / options["rho"]
    return [(high**power + u * (low**power - high**power)) ** options["rho"] for u in _shares(n)]


def polyexponential(low: float, high: float, n: int, options: Mapping[str, float]) -> list[float]:
    """k-diffusion's polyexponential ramp; rho = 1 is the exponential one."""
    return [low * (high / low) ** ((1 - u) ** options["rho"]) for u in _shares(n)]


def beta_sigmas(low: float, high: float, n: int, options: Mapping[str, float]) -> list[float]:
    """Quantiles of a beta distribution over the noise, as diffusers' use_beta_sigmas."""
    at = [1 - u for u in _shares(n)]
    found = beta_quantiles(at, options["alpha"], options["beta"])
    return [low + p * (high - low) for p in found]


def _kl_optimal(low: float, high: float, n: int, options: Mapping[str, float]) -> list[float]:
    return [math.tan(u * math.atan(low) + (1 - u) * math.atan(high)) for u in _shares(n)]


def _linear_quadratic(low: float, high: float, n: int, options: Mapping[str, float]) -> list[float]:
    half = n // 2
    rest = half - 0.025 * n
    square = rest / (half * (n - half) ** 2)
    slope = 0.025 / half - 2 * rest / (n - half) ** 2
    curve = [
        0.025 * i / half if i < half else square * i * i + slope * i + square * half * half
        for i in range(n)
    ]
    return [high * (1 - c) for c in curve]


RAMPS: Mapping[str, Ramp] = {
    "karras": karras,
    "exponential": polyexponential,
    "polyexponential": polyexponential,
    "beta_sigmas": beta_sigmas,
    "kl_optimal": _kl_optimal,
    "linear_quadratic": _linear_quadratic,
}


def beta_quantiles(shares: Sequence[float], a: float, b: float) -> list[float]:
    """Quantiles of the beta distribution with parameters a and b, by bisection of its integral."""
    import numpy as np

    target = np.asarray(shares, dtype=np.float64)
    low, high = np.zeros_like(target), np.ones_like(target)
    for _ in range(60):
        middle = (low + high) / 2
        above = _beta_integral(middle, a, b) > target
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    found = (low + high) / 2
    return np.where(target <= 0, 0.0, np.where(target >= 1, 1.0, found)).tolist()


def _beta_integral(x: Any, a: float, b: float) -> Any:
    """Regularised incomplete beta function, by its continued fraction on the side that converges.

    Press et al., Numerical Recipes, 3rd edition, section 6.4.
    """
    import numpy as np

    flip = x > (a + 1) / (a + b + 2)
    p, q = np.where(flip, b, a), np.where(flip, a, b)
    y = cast("NDArray[np.float64]", np.where(flip, 1 - x, x))
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    with np.errstate(divide="ignore"):
        scale = np.exp(front + p * np.log(y) + q * np.log1p(-y)) / p
    c = np.ones_like(y)
    h = d = 1 / (1 - (p + q) * y / (p + 1))
    for m in range(1, 60):
        even = m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m))
        odd = -(p + m) * (p + q + m) * y / ((p + 2 * m) * (p + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            h = h * d * c
    part = np.where(y > 0, scale * h, 0.0)
    return np.where(flip, 1 - part, part)
