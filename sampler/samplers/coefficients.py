"""Coefficients of the multistep sums, newest slope first.

With D = 1 − E^{-1} the backward difference, Adams-Bashforth for equal steps is the series
sum_j GAMMA[j]·D^j cut after D^{r−1}; heavy-ball velocities v = beta/(beta + (1 − beta)·D)·f turn
it into the one of GHVB. those of unequal steps are in `multistep_weights.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated

from annotated_types import Ge, Le

# 1, 1/2, 5/12, 3/8, 251/720: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I,
# section III.1, table 1.1.
GAMMA = (1.0, 1 / 2, 5 / 12, 3 / 8, 251 / 720)
MAX_ORDER = len(GAMMA)
Order = Annotated[int, Ge(1), Le(MAX_ORDER)]


@cache
def adams_bashforth(order: int) -> tuple[float, ...]:
    """b_0 .. b_{order − 1} for equal steps; they sum to 1."""
    return _in_powers_of_e(GAMMA[:order])


@cache
def ghvb(order: int, beta: float) -> tuple[float, ...]:
    """c_0 .. c_{order − 1} for GHVB's velocities; they sum to 1, beta = 1 is Adams-Bashforth.

    [1 + ((1 − beta)/beta)·D]·sum_j GAMMA[j]·D^j, cut after D^{order − 1}.
    """
    ratio = (1 - beta) / beta
    series = [GAMMA[j] + (ratio * GAMMA[j - 1] if j else 0.0) for j in range(order)]
    return _in_powers_of_e(series)


def _in_powers_of_e(series: Sequence[float]) -> tuple[float, ...]:
    """sum_j series[j]·(1 − E)^j as coefficients of 1, E, E², ..."""
    coefficients = [0.0] * len(series)
    power = [1.0]
    for value in series:
        for k, binomial in enumerate(power):
            coefficients[k] += value * binomial
        power = [a - b for a, b in zip([*power, 0.0], [0.0, *power], strict=True)]
    return tuple(coefficients)
