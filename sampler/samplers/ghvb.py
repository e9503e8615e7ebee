"""Generalised heavy ball: momentum before the multistep sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.samplers.coefficients import Order, ghvb
from sampler.samplers.coordinates import (
    Space,
    advance,
    check_space,
    euler,
    slope,
    space_of,
    weighted,
)
from sampler.samplers.momentum import (
    Beta,
    Momentum,
    MomentumNumber,
    bound_number,
    damped,
    require_number,
    resolved,
)
from sampler.types import Level, Move, Prediction, SamplerBase, Span


@register("sampler", "ghvb")
@dataclass(frozen=True)
class GHVB(SamplerBase):
    """Generalised heavy ball: momentum on the slopes, then a multistep sum that undoes its lag.

        v_{n+1} = (1 − beta)·v_n + beta·f_n,   v_0 = f_0
        z_{n+1} = z_n + (u_{n+1} − u_n)·sum_j c_j·v_{n+1−j}
        c from [1 + ((1 − beta)/beta)·D]·(1 + D/2 + 5/12·D² + 3/8·D³ + 251/720·D⁴), `order` terms

    z, u, f and D as for `ab`. Of convergence order `order`; beta = 1 is `ab`. While the history is
    short, the order is the number of velocities there are, so the first step is DDIM's.

    momentum_number: (0, 5], its ceiling is the order, the rest beta: 1.8 is order 2 with beta 0.8.
        Default 1.8: of the fixed numbers the best on the golden mixture under strong guidance and
        at few steps; 3.8 is more accurate at many steps and weak guidance (docs/samplers.md).
        "calibrated:FILE" takes the number that `sampler calibrate momentum` found.
    order: 1 to 5, the other form; it goes with beta. beta: (0, 1], with order.
    space: as for `ab`. Published is eps-space; flow on a flow model is ours.

    Where the paper's text and its code differ (the sign in eq. 19, an index of Algorithm 2), the
    generating rule decides: beta = 1 must be Adams-Bashforth.
    """

    momentum_number: MomentumNumber | None = None
    order: Order | None = None
    beta: Beta | None = None
    space: Space = "auto"

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts "
        "(Wizadwongsa et al., 2024), arXiv:2307.11118, Algorithm 2"
    )

    def __post_init__(self) -> None:
        self.momentum  # noqa: B018 - checks the numbers

    @property
    def momentum(self) -> Momentum:
        """Order and beta."""
        return resolved("ghvb", self.momentum_number, self.order, self.beta)

    @property
    def convergence(self) -> float:
        return float(self.momentum.order)

    def bind(self, context: SamplerContext) -> GHVB:
        """With the calibrated number of this model and run, where one is requested."""
        return replace(self, momentum_number=bound_number(self, context))

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        require_number("ghvb", self.momentum_number)
        check_space("ghvb", self.space, grid)
        return grid

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        (order, beta), space = self.momentum, space_of(span, self.space)
        v = damped(beta, state[0] if state else None, slope(pred, span, space))
        velocities = (v, *state)[:order]
        kept = velocities[: max(1, order - 1)]
        if not state:
            return Move(euler(pred, span), 0.0, kept)
        e = weighted(ghvb(len(velocities), beta), velocities)
        return Move(advance(pred, span, e, space), 0.0, kept)
