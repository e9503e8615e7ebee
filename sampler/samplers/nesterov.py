"""Nesterov momentum on Adams-Bashforth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.registry import register
from sampler.samplers.coordinates import advance, damped, euler
from sampler.samplers.momentum import HeavyBallState, MomentumSampler, heavy_ball
from sampler.types import Move, Prediction, Span


@register("sampler", "nesterov")
@dataclass(frozen=True)
class Nesterov(MomentumSampler):
    """Nesterov momentum: the multistep slope, averaged, with one look ahead; the paper's ablation.

        e_n = sum_j b_j·f_{n−j};   v_{n+1} = (1 − beta)·v_n + beta·e_n,   v_0 = f_0
        z_{n+1} = z_n + (u_{n+1} − u_n)·[(1 − beta)·v_{n+1} + beta·e_n]

    z, u, f and b as for `ab`. First order where beta < 1, whatever the order of the sum; beta = 1
    is `ab`.

    momentum_number, order, beta, space: as for `ghvb`.
    """

    reference: ClassVar[str] = (
        "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts "
        "(Wizadwongsa et al., 2024), arXiv:2307.11118, appendix"
    )

    def step(self, x: Any, pred: Prediction, span: Span, state: HeavyBallState | tuple[()]) -> Move:
        e, after = heavy_ball(self, pred, span, state)
        if not state:
            return Move(euler(pred, span), 0.0, after)
        ahead = damped(self.momentum.beta, after.velocity, e)
        return Move(advance(pred, span, ahead, self.space), 0.0, after)
