"""ER-SDE: the extended reverse-time SDE, whose noise function is nearly the best at few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

from annotated_types import Ge, Le

from sampler.registry import register
from sampler.registry.constraints import Nonnegative
from sampler.samplers.exponential import falling, line, noisy
from sampler.samplers.multistep_weights import gauss
from sampler.samplers.shares import NoiseKind, log_er, refuse_rows, share
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


class ERSDEState(NamedTuple):
    """rho and x0 of the step before, its divided difference, and the rho before that."""

    rho: float
    x0: Any
    slope: Any  # None after the first step
    older: float


@register("sampler", "er_sde")
@dataclass(frozen=True)
class ERSDE(SamplerBase):
    """ER-SDE-Solver: a Taylor series of x0 in rho = sigma/alpha, integrated with little noise.

        x' = alpha'·x0 + k·sigma'·eps + alpha'·(Delta + psi(rho')·S_0)·D_1
             + alpha'·(Delta²/2 + psi(rho')·S_1)·D_2 + s_noise·sigma'·sqrt(1 − k²)·z
        psi(rho) = rho·(e^{rho^0.3} + 10)^eta,   k = psi(rho')·rho/(psi(rho)·rho')
        S_0 = ∫ dv/psi(v),   S_1 = ∫ (v − rho)/psi(v) dv   over rho'..rho,   Delta = rho' − rho

    D_1 and D_2 are divided differences of x0; the first step is of order 1, the second of order 2.

    order: 1 to 3 (default).
    eta: amount of noise; 1 (default) as published, 0 is deterministic.
    s_noise: factor on the noise; 1 keeps the level's amount.
    points: None (default) integrates exactly; a number, at least 10, takes the left sum of as many
        points: 200 in ComfyUI, 100 in the authors' code, 5e-4 off at 8 steps.
    noise: as for `ddim`.
    """

    order: Annotated[int, Ge(1), Le(3)] = 3
    eta: Nonnegative = 1.0
    s_noise: Nonnegative = 1.0
    points: Annotated[int, Ge(10)] | None = None
    noise: NoiseKind = "step"

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models "
        "(Cui et al., 2023), arXiv:2309.06169, Algorithm 1 to 3"
    )

    @property
    def convergence(self) -> float | None:
        return None if self.stochastic else float(min(2, self.order))

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid itself. Raises ValueError for a level that is not below the one before."""
        return falling("er_sde", grid)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        refuse_rows(span)
        k, fresh = share("er", span, self.eta)
        mean = line(pred, span, k=k)
        if span.now.alpha == 0 or span.next.sigma == 0 or self.order == 1:
            return noisy(self, mean, span, fresh, ())  # rho = inf is no node
        rho, end = span.now.sigma / span.now.alpha, span.next.sigma / span.next.alpha
        if not state:
            return noisy(self, mean, span, fresh, ERSDEState(rho, pred.x0, None, math.inf))
        first, second = self._factors(rho, end)
        slope = (pred.x0 - Lin.of(state.x0)) * (1 / (rho - state.rho))
        mean = mean + span.next.alpha * first * slope
        if state.slope is not None and self.order == 3:
            bend = (slope - Lin.of(state.slope)) * (2 / (rho - state.older))
            mean = mean + span.next.alpha * second * bend
        kept = slope if self.order == 3 else None
        return noisy(self, mean, span, fresh, ERSDEState(rho, pred.x0, kept, state.rho))

    def _factors(self, rho: float, end: float) -> tuple[float, float]:
        """Factors of D_1 and D_2: Delta + psi(rho')·S_0 and Delta²/2 + psi(rho')·S_1."""
        width = rho - end
        if self.points is None:  # in ln v, dv = v·d(ln v)
            nodes, mass = gauss(20)
            points = [end * (rho / end) ** s for s in nodes]
            dv = [w * v * math.log(rho / end) for w, v in zip(mass, points, strict=True)]
        else:
            points = [end + i * width / self.points for i in range(self.points)]
            dv = [width / self.points] * self.points
        ratio = [  # psi(rho')/psi(v) dv
            end / v * math.exp(self.eta * (log_er(end) - log_er(v))) * d
            for v, d in zip(points, dv, strict=True)
        ]
        moment = math.fsum(r * (v - rho) for r, v in zip(ratio, points, strict=True))
        return math.fsum(ratio) - width, moment + width**2 / 2
