"""Weights of a forecast, and the steps that a window evaluates: float64 numbers on the host.

A forecast is q̂ = Σ_j w_j·q_j over the evaluated predictions q_j, newest first, whose clocks are
τ_0, τ_1, ... The weights depend on the clocks alone. NaN marks a node that a sample does not have;
its weight is 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

# Above this Σ|w| an order of 2 or more extrapolates its nodes' noise more than their curve: three
# neighbouring nodes, two steps ahead, have 17.
LARGEST_SUM = 5.0


def polynomial(clocks: Any, target: float, order: int) -> Any:
    """Lagrange weights [B, K] at `target` of the newest nodes of clocks [B, K].

        w_j = Π_{k≠j} (τ − τ_k)/(τ_j − τ_k),   Σ w_j = 1

    The highest order up to `order` whose nodes exist and whose Σ|w| is at most 5; order 1 (a line)
    wherever there are two nodes, order 0 (hold) at one.
    """
    import numpy as np

    clocks = np.asarray(clocks, dtype=np.float64)
    found = np.zeros_like(clocks)
    for degree in range(min(order, clocks.shape[1] - 1) + 1):
        weights = _lagrange(clocks[:, : degree + 1], target)
        fits = np.isfinite(weights).all(1)
        if degree > 1:
            fits &= np.abs(weights).sum(1) <= LARGEST_SUM
        found[fits] = 0.0
        found[fits, : degree + 1] = weights[fits]
    return found


def chebyshev(
    clocks: Any, target: float, degree: int, ridge: float, horizon: float, blend: float
) -> Any:
    """Weights [B, K] of a ridge regression on Chebyshev polynomials T_0 ... T_degree.

        w = X (XᵀX + λI)⁻¹ T(z),   X_jm = T_m(z_j),   z = 2·τ/horizon − 1
        with blend b:  b·w + (1 − b)·(the line through the newest two nodes)

    The ridge λ shrinks them: their sum is below 1.
    """
    import numpy as np

    clocks = np.asarray(clocks, dtype=np.float64)
    weights = (1 - blend) * polynomial(clocks, target, 1)
    at = _basis(np.array([target]), degree, horizon)[0]
    for row, times in enumerate(clocks):
        known = np.isfinite(times)
        nodes = _basis(times[known], degree, horizon)
        matrix = nodes.T @ nodes + ridge * np.eye(degree + 1)
        weights[row, known] += blend * (nodes @ np.linalg.solve(matrix, at))
    return weights


@cache
def windowed(steps: int, warmup: int, window: float, growth: float, last: int) -> tuple[bool, ...]:
    """Steps that a window evaluates: the first `warmup`, the last `last`, and, between them,

    step i where (steps left out since the last evaluation + 1) mod floor(window) is 0; `window`
    grows by `growth` at each of these.
    """
    found: list[bool] = []
    skipped = 0
    for step in range(steps):
        due = step < warmup or (skipped + 1) % int(window) == 0
        if due and step >= warmup:
            window += growth
        due = due or step >= steps - last
        skipped = 0 if due else skipped + 1
        found.append(due)
    return tuple(found)


def _lagrange(clocks: Any, target: float) -> Any:
    import numpy as np

    weights = np.ones_like(clocks)
    for j in range(clocks.shape[1]):
        for k in range(clocks.shape[1]):
            if k != j:
                weights[:, j] *= (target - clocks[:, k]) / (clocks[:, j] - clocks[:, k])
    weights[~np.isfinite(clocks)] = np.nan
    return weights


def _basis(times: Any, degree: int, horizon: float) -> Any:
    from numpy.polynomial.chebyshev import chebvander

    return cast(Any, chebvander)(2 * times / horizon - 1, degree)
