"""DEIS and gradient estimation: multistep methods on the predicted noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import DocInfo, Ge, Le

from sampler.registry import register
from sampler.samplers.coordinates import advance, euler, gain, log_snr, slope, weighted
from sampler.samplers.dpmpp import SHORT_RUN
from sampler.samplers.exponential import History, falling, nodes, to_next_order
from sampler.samplers.multistep_weights import places, weights
from sampler.samplers.shares import refuse_rows
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


@register("sampler", "deis")
@dataclass(frozen=True)
class DEIS(SamplerBase):
    """Diffusion exponential integrator: a polynomial through the last predictions of the noise.

        x' = (alpha'/alpha)·x + (sigma' − alpha'·sigma/alpha)·sum_j w_j·eps_j
        sum_j w_j·s_j^m = ∫ e^{−hs}·s^m ds / ∫ e^{−hs} ds over 0..1,   m = 0 .. order − 1

    The polynomial is one in lambda = log(alpha/sigma), h = lambda' − lambda, and the step is 0..1
    (log-rho DEIS). The last step is first order at sigma' = 0, and in runs of fewer than 15 steps,
    where the one before is second order at most.

    order: 1 (DDIM) to 3; 2 by default.
    """

    order: Annotated[int, Ge(1), Le(3)] = 2

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2022), "
        "arXiv:2204.13902, eq. 15, in log-rho"
    )

    @property
    def convergence(self) -> float:
        return float(min(2, self.order))

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid itself. Raises ValueError for a level that is not below the one before."""
        return falling("deis", grid)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        refuse_rows(span)
        u, end = log_snr(span.now), log_snr(span.next)
        if end == math.inf:
            return Move(span.next.alpha * pred.x0, 0.0, ())
        if u == -math.inf:
            return Move(euler(pred, span), 0.0, ())
        known = ((u, pred.eps), *state)[: self.order]
        return Move(
            _mean(pred, span, known[: _left(span, self.order)]), 0.0, known[: self.order - 1]
        )

    def error_term(self, pred: Prediction, move: Move, span: Span, state: Any) -> Lin:
        return pred.eps

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        span = spans[-1]
        found = nodes(spans, self.order + 1, log_snr)
        if not found:
            return ()
        h = log_snr(span.next) - log_snr(span.now)
        taken = min(self.order, _left(span, self.order))
        return to_next_order(spans, found, log_snr, weights, -h, gain(span, "eps"), taken)


def _left(span: Span, order: int) -> int:
    """Highest order of a step: short runs end with lower ones."""
    return span.total - span.index if 0 < span.total < SHORT_RUN else order


def _mean(pred: Prediction, span: Span, known: History) -> Lin:
    """x' of the polynomial through these values (lambda, eps), newest first."""
    if len(known) == 1:
        return euler(pred, span)
    u, end = log_snr(span.now), log_snr(span.next)
    w = weights(places([u for u, _ in known], end), u - end)
    return advance(pred, span, weighted(w, [e for _, e in known]), "eps")


@register("sampler", "gradient_estimation")
@dataclass(frozen=True)
class GradientEstimation(SamplerBase):
    """Gradient estimation: Euler along a slope that is extrapolated whatever the steps.

        e = gamma·f + (1 − gamma)·f_before,   f = eps, or the velocity on a flow model

    The first step has e = f, the one to sigma' = 0 is the predicted x0.

    gamma: at least 1, which is Euler (`ddim`); 1.5 is Adams-Bashforth of order 2 on equal steps, 2
        (default) the published choice, of order 1.
    """

    gamma: Annotated[float, Ge(1), DocInfo("1 is Euler")] = 2.0

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Interpreting and Improving Diffusion Models from an Optimization Perspective (Permenter & "
        "Yuan, 2024), openreview o2ND9v0CeK, Algorithm 2"
    )

    @property
    def convergence(self) -> float:
        return 2.0 if self.gamma == 1.5 else 1.0

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid itself. Raises ValueError for a level that is not below the one before."""
        return falling("gradient_estimation", grid)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if span.next.sigma == 0:
            return Move(span.next.alpha * pred.x0, 0.0, ())
        f = slope(pred, span)
        if not state:
            no_node = isinstance(span.now.alpha, float) and span.now.alpha == 0.0
            return Move(euler(pred, span), 0.0, () if no_node else (f,))
        e = self.gamma * f + (1 - self.gamma) * Lin.of(state[0])
        return Move(advance(pred, span, e), 0.0, (f,))
