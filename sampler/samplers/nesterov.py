"""Nesterov momentum on Adams-Bashforth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.samplers.coefficients import Order, adams_bashforth
from sampler.samplers.coordinates import Space, advance, check_space, euler, slope, weighted
from sampler.samplers.momentum import (
    Beta,
    Momentum,
    MomentumNumber,
    bound_number,
    damped,
    require_number,
    resolved,
)
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


@register("sampler", "nesterov")
@dataclass(frozen=True)
class Nesterov(SamplerBase):
    """Nesterov momentum: the averaged multistep slope with one look ahead; the paper's ablation.

        e_n = sum_j b_j·f_{n−j};   v_{n+1} = (1 − beta)·v_n + beta·e_n,   v_0 = f_0
        z_{n+1} = z_n + (u_{n+1} − u_n)·[(1 − beta)·v_{n+1} + beta·e_n]

    z, u, f and b as for `ab`. First order where beta < 1, whatever the order of the sum; beta = 1
    is `ab`.

    momentum_number, order, beta, space: as for `ghvb`.
    """

    momentum_number: MomentumNumber | None = None
    order: Order | None = None
    beta: Beta | None = None
    space: Space = "auto"

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts "
        "(Wizadwongsa et al., 2024), arXiv:2307.11118, appendix"
    )

    def __post_init__(self) -> None:
        self.momentum  # noqa: B018 - checks the numbers

    @property
    def momentum(self) -> Momentum:
        """Order and beta."""
        return resolved("nesterov", self.momentum_number, self.order, self.beta)

    @property
    def convergence(self) -> float:
        return float(self.momentum.order) if self.momentum.beta == 1 else 1.0

    def bind(self, context: SamplerContext) -> Nesterov:
        """With the calibrated number of this model and run, where one is requested."""
        return replace(self, momentum_number=bound_number(self, context))

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        require_number("nesterov", self.momentum_number)
        check_space("nesterov", self.space, grid)
        return grid

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        order, beta = self.momentum
        velocity, history = state or (None, ())
        slopes = (slope(pred, span, self.space), *history)[:order]
        e = weighted(adams_bashforth(len(slopes)), slopes)
        v = damped(beta, velocity, e)
        kept = (v, slopes[: order - 1])
        if not state:
            return Move(euler(pred, span), 0.0, kept)
        ahead = damped(beta, Lin.of(v), e)
        return Move(advance(pred, span, ahead, self.space), 0.0, kept)
