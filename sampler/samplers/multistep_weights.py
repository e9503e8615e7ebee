"""Weights of the multistep sums on unequal steps: a polynomial through values at known places.

The step is mapped to 0..1; the polynomial in s is averaged with the kernel e^{Hs} of the exact
solution:

    w solves  sum_j w_j·s_j^m = M_m(H),   M_m(H) = ∫ e^{Hs}·s^m ds / ∫ e^{Hs} ds over 0..1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache


def moments(H: float, count: int) -> list[float]:
    """M_m = ∫ e^{Hs}·s^m ds / ∫ e^{Hs} ds over 0..1, m = 0 .. count − 1; 1/(m + 1) at H = 0.

    By the recursion I_m = 1 − (m/H)·I_{m−1}, M_m = I_m/I_0; by quadrature where |H| < 2, as the
    recursion cancels there.
    """
    if H == 0:
        return [1 / (m + 1) for m in range(count)]
    if abs(H) < 2:
        nodes, mass = gauss(16)
        kernel = [w * math.exp(H * s) for s, w in zip(nodes, mass, strict=True)]
        whole = math.fsum(kernel)
        return [
            math.fsum(k * s**m for k, s in zip(kernel, nodes, strict=True)) / whole
            for m in range(count)
        ]
    # for H < 0 all I are multiplied by e^H, so that none overflows
    top = 1.0 if H > 0 else math.exp(H)
    found = [-math.expm1(-H) if H > 0 else math.expm1(H)]
    for m in range(1, count):
        found.append(top - m / H * found[-1])
    return [value / found[0] for value in found]


@cache
def gauss(count: int) -> tuple[list[float], list[float]]:
    """Nodes in 0..1 and weights, of sum 1, of Gauss-Legendre quadrature."""
    import numpy as np

    nodes, mass = np.polynomial.legendre.leggauss(count)
    return ((nodes + 1) / 2).tolist(), (mass / 2).tolist()


def solved(places: Sequence[float], values: Sequence[float]) -> tuple[float, ...]:
    """Solve sum_j w_j·s_j^m = values[m] for the weights w of nodes at `places`.

    Raises ValueError for nodes that coincide.
    """
    if len(set(places)) < len(places):
        raise ValueError(f"The nodes {list(places)} of a multistep formula must be distinct.")
    import numpy as np

    matrix = np.asarray(places)[None, :] ** np.arange(len(places))[:, None]
    return tuple(np.linalg.solve(matrix, np.asarray(values[: len(places)])).tolist())


@lru_cache(maxsize=4096)
def weights(places: tuple[float, ...], H: float) -> tuple[float, ...]:
    """Weights of values at `places` of a step 0..1: interpolate, average with the kernel e^{Hs}.

    H = 0 is Adams-Bashforth for unequal steps. They sum to 1; places must be distinct. They are
    kept, since every batch of a run takes the same steps.
    """
    return solved(places, moments(H, len(places)))


def flat(places: tuple[float, ...], H: float) -> tuple[float, ...]:
    """Weights without the kernel: Adams-Bashforth in the clock."""
    return weights(places, 0.0)


def simple(places: tuple[float, ...], H: float) -> tuple[float, ...]:
    """Weights of two values, at 0 and at s: w_s = (H/2)/(1 − e^{−H})/s; exact ones otherwise."""
    if len(places) != 2 or not math.isfinite(H):
        return weights(places, H)
    w = H / 2 / -math.expm1(-H)
    return tuple(w / s if s else 1 - w / sum(places) for s in places)


def places(clocks: Sequence[float], end: float) -> tuple[float, ...]:
    """Map clocks to the step from clocks[0] to `end` as 0..1; earlier ones are negative."""
    return tuple((u - clocks[0]) / (end - clocks[0]) for u in clocks)
