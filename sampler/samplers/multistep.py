"""Adams-Bashforth (PLMS) on the probability-flow ODE, in the coordinates of `coordinates.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.registry import register
from sampler.samplers.coordinates import advance, euler, slope, weighted
from sampler.types import Move, Prediction, SamplerBase, Span

# The generating series of Adams-Bashforth: sum_j GAMMA[j]·D^j, D the backward difference.
GAMMA = (1.0, 1 / 2, 5 / 12, 3 / 8, 251 / 720)


def adams_bashforth(order: int) -> list[float]:
    """Coefficients of the slopes for equal steps, newest first; they sum to 1.

    sum_{j < order} GAMMA[j]·(1 − E)^j, E one step back in time.
    """
    coefficients = [0.0] * order
    power = [1.0]  # (1 − E)^j, in powers of E
    for gamma in GAMMA[:order]:
        for k, value in enumerate(power):
            coefficients[k] += gamma * value
        power = [a - b for a, b in zip([*power, 0.0], [0.0, *power], strict=True)]
    return coefficients


@register("sampler", "ab")
@dataclass(frozen=True)
class AdamsBashforth(SamplerBase):
    """Adams-Bashforth (PLMS): extrapolates the last slopes; one evaluation per step.

        z' = z + (u' − u)·sum_j b_j·f_{n−j},   b from (1 + D/2 + 5/12·D² + 3/8·D³ + 251/720·D⁴)

    The first steps use the order that the history allows, so the first one is DDIM's. The
    coefficients assume equal steps in u; on other grids every order above 2 falls back to 2.

    order: 1 (DDIM) to 5; 4 is PLMS as published.
    """

    order: int = 4

    reference: ClassVar[str] = (
        "Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), "
        "arXiv:2202.09778, eq. 9"
    )

    def __post_init__(self) -> None:
        if self.order not in range(1, 6):
            raise ValueError(f"ab: order = {self.order} must be one of 1, 2, 3, 4, 5.")

    @property
    def convergence(self) -> float:
        return float(self.order)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        slopes = (slope(pred, span), *state)[: self.order]
        if len(slopes) == 1:
            return Move(euler(pred, span), 0.0, slopes[: self.order - 1])
        e = weighted(adams_bashforth(len(slopes)), slopes)
        return Move(advance(pred, span, e), 0.0, slopes[: self.order - 1])
