"""Two evaluations per step, as two steps on a longer grid: DPM++ SDE, DPM++ 2S and RES 2S.

    rho_m = rho^{1−r}·rho'^r      the middle level, at r of the step 0..1 in ln(sigma/alpha)
    x_m = c_1·x + (alpha_m − c_1·alpha)·D + noise,   c and k as in `exponential.py`
    x'  = c·x + (alpha' − c·alpha)·(w_0·D + w_1·D_m)
          + (k_2·sigma'/sigma_m)·(x_m − mean_m) + s_noise·sigma'·sqrt(1 − k_2²)·z,   k_2 = k/k_1

x_m − mean_m is the noise that the first half drew: carrying it on makes both noises those of one
Brownian path. There is no middle level before sigma' = 0, where x' = D, nor after alpha = 0: n
steps cost 2n − 1 evaluations.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Gt, Le

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.registry.constraints import Fraction, Nonnegative
from sampler.samplers.coordinates import is_flow, log_snr
from sampler.samplers.exponential import (
    KEPT,
    Share,
    carried,
    effective,
    falling,
    flat,
    line,
    refuse_rows,
    share,
    weights,
)
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span

if TYPE_CHECKING:
    from sampler.core.schedule import Schedule

Middle = Annotated[float, Gt(0), Le(1)]


class Half(NamedTuple):
    """The first half of a step: where it began, and what it predicted without noise."""

    x: Any
    x0: Any
    level: Level
    mean: Any  # None where no noise was drawn
    k: float


class TwoStage(SamplerBase):
    """Common part: the levels, and the two halves of a step."""

    policy: ClassVar[str] = "sde"
    eta: float
    s_noise: float
    _schedule: ClassVar[Any] = None  # an instance's own: the times of middle levels

    @property
    def convergence(self) -> float | None:
        return None if self.stochastic else 2.0

    @property
    def evaluations(self) -> int:
        return 2

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def bind(self, context: SamplerContext) -> TwoStage:
        """The sampler with the times at which this model knows the middle levels."""
        return self.with_schedule(context.adapter.schedule)

    def with_schedule(self, schedule: Schedule) -> TwoStage:
        """The sampler for the levels of a schedule."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_schedule", schedule)
        return bound

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid with a middle level in every step that has one; ValueError if it rises."""
        walked = [falling(self.name, grid)[0]]
        for now, after in pairwise(grid):
            middle = self._middle_of_rows(now, after)
            walked += [after] if middle is None else [middle, after]
        return tuple(walked)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        refuse_rows(span)
        if state:
            return self._second(pred, Span(span.index, state.level, span.next), span, state)
        if _whole(span):
            k, fresh = share(self.policy, span, self.eta)
            return Move(line(pred, span, k=k), self.s_noise * span.next.sigma * fresh, ())
        return self._first(pred, span)

    def place(self, span: Span) -> float:
        """The place of the middle level in a step 0..1, in ln(sigma/alpha)."""
        raise NotImplementedError

    def combined(self, r: float, H: float) -> tuple[float, ...]:
        """Weights of the two predictions."""
        raise NotImplementedError

    def _first(self, pred: Prediction, span: Span) -> Move:
        k, fresh = share(self.policy, span, self.eta)
        mean, std = line(pred, span, k=k), self.s_noise * span.next.sigma * fresh
        return Move(mean, std, Half(pred.x, pred.x0, span.now, mean if std else None, k))

    def _second(self, pred: Prediction, whole: Span, span: Span, half: Half) -> Move:
        k, _ = share(self.policy, whole, self.eta)
        start, middle, end = (log_snr(v) for v in (half.level, span.now, whole.next))
        r = (middle - start) / (end - start)
        w_0, w_1 = self.combined(r, effective(end - start, k))
        mean = carried(half.x, whole, w_0 * Lin.of(half.x0) + w_1 * pred.x0, k)
        # at r = 1 no noise is left to draw: a rounded k would leave some
        kept, fresh = KEPT if _at_end(r) else self._rest(span, half, k)
        if half.mean is not None:
            drawn = pred.x - Lin.of(half.mean)
            mean = mean + (kept * span.next.sigma / span.now.sigma) * drawn
        return Move(mean, self.s_noise * span.next.sigma * fresh, ())

    def _rest(self, span: Span, half: Half, k: float) -> Share:
        """k_2 = k/k_1 and sqrt(1 − k_2²) of the second half."""
        return share(self.policy, span, self.eta)

    def _middle(self, span: Span) -> Level:
        r = self.place(span)
        return span.next if _at_end(r) else between(span, r, self._schedule)

    def _middle_of_rows(self, now: Level, after: Level) -> Level | None:
        """The middle level, None for a step without; of level tensors [B] one for each sample.

        There a sample without a middle level makes its step in the first half and waits.
        """
        if isinstance(now.sigma, (int, float)):
            return None if _whole(Span(0, now, after)) else self._middle(Span(0, now, after))
        import torch

        from sampler.core.rows import of_rows

        steps = [Span(0, a, b) for a, b in zip(of_rows(now), of_rows(after), strict=True)]
        halved = [span.now != span.next and not _whole(span) for span in steps]
        if not any(halved):
            return None
        found = [
            self._middle(span) if half else span.next
            for span, half in zip(steps, halved, strict=True)
        ]
        return Level(*(torch.tensor(v, dtype=torch.float64) for v in zip(*found, strict=True)))


@register("sampler", "res_2s")
@dataclass(frozen=True)
class RES2S(TwoStage):
    """RES 2S: the second-order exponential Runge-Kutta method on x0, with or without noise.

        e = w_0·D + w_1·D_m,   w_1 = M_1(H)/r   (phi_2),   1/(2r)   (phi_1),   w_0 = 1 − w_1
        k = e^{−eta·h},   H = (1 + eta)·h,   M_1 as for `dpmpp_3m_sde`

    The step is that of `two_stage.py`: D at its start, D_m at the level that lies at the share r of
    it in lambda = ln(alpha/sigma), both noises of one Brownian path. n steps cost 2n − 1
    evaluations.

    eta: amount of noise, at least 0; 0 (default) is deterministic. SEEDS-2 is eta 1 with phi_1.
    s_noise: factor on the noise; 1 keeps the level's amount.
    r: place of the middle level, above 0 to 1; 0.5 by default. With 1, the end of the step, it is
        the exponential Heun method (exp_heun_2_x0).
    solver_type: "phi_2" (default) or "phi_1", as above.
    """

    eta: Nonnegative = 0.0
    s_noise: Nonnegative = 1.0
    r: Middle = 0.5
    solver_type: Literal["phi_1", "phi_2"] = "phi_2"

    reference: ClassVar[str] = (
        "Refined Exponential Solver (Zhang et al., 2023), arXiv:2308.02157; SEEDS (Gonzalez et "
        "al., 2023), arXiv:2305.14267, Algorithm 1"
    )

    def place(self, span: Span) -> float:
        return self.r

    def combined(self, r: float, H: float) -> tuple[float, ...]:
        return (weights if self.solver_type == "phi_2" else flat)((0.0, r), H)


@register("sampler", "dpmpp_sde")
@dataclass(frozen=True)
class DPMSolverPPSDE(TwoStage):
    """DPM++ SDE: two stages on x0 with ancestral noise in both.

        e = (1 − 1/(2r))·D + D_m/(2r),   k² = 1 − eta²·(1 − (rho'/rho)²)

    The step is that of `res_2s`. Both noises are those of one Brownian path, as k-diffusion has
    them; codes that draw two independent ones lose contrast. At eta 1 it is `res_2s` with phi_1 and
    eta 1.

    eta: amount of noise, 0 to 1 (default). s_noise, r: as for `res_2s`.
    """

    eta: Fraction = 1.0
    s_noise: Nonnegative = 1.0
    r: Middle = 0.5

    policy: ClassVar[str] = "eta"
    reference: ClassVar[str] = (
        "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095; k-diffusion's sample_dpmpp_sde"
    )

    def place(self, span: Span) -> float:
        return self.r

    def combined(self, r: float, H: float) -> tuple[float, ...]:
        return flat((0.0, r), H)

    def _rest(self, span: Span, half: Half, k: float) -> Share:
        rho, middle, end = (_ratio(v) for v in (half.level, span.now, span.next))
        lost = self.eta**2 * (middle - end) * (middle + end) / rho**2  # k_1² − k²
        return Share(k / half.k, math.sqrt(lost) / half.k)


@register("sampler", "dpmpp_2s")
@dataclass(frozen=True)
class DPMSolverPP2S(TwoStage):
    """DPM++ 2S: two stages on x0; with eta above 0 "DPM++ 2S a", with noise at the end only.

        x_m = (sigma_m/sigma)·x + (alpha_m − alpha·sigma_m/sigma)·D,   rho_m² = rho·rho_d
        x'  = c·x + (alpha' − c·alpha)·D_m + s_noise·sigma'·sqrt(1 − k²)·z,   c = k·sigma'/sigma

    k as for `euler_ancestral`, rho_d = k·rho' the level that is stepped down to: the middle lies
    half way to it. n steps cost 2n − 1 evaluations.

    eta: amount of noise, 0 (default, deterministic) to 1. s_noise: as for `res_2s`.
    """

    eta: Fraction = 0.0
    s_noise: Nonnegative = 1.0

    reference: ClassVar[str] = (
        "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, Algorithm 1; k-diffusion's "
        "sample_dpmpp_2s_ancestral"
    )

    def place(self, span: Span) -> float:
        h = log_snr(span.next) - log_snr(span.now)
        return effective(h, self._share(span).k) / h / 2

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        refuse_rows(span)
        if not state and not _whole(span):
            return Move(line(pred, span), 0.0, Half(pred.x, None, span.now, None, 1.0))
        whole = Span(span.index, state.level, span.next) if state else span
        k, fresh = self._share(whole)
        mean = carried(state.x, whole, pred.x0, k) if state else line(pred, span, k=k)
        return Move(mean, self.s_noise * span.next.sigma * fresh, ())

    def _share(self, span: Span) -> Share:
        return share("flow" if is_flow(span) else "eta", span, self.eta)


def between(span: Span, r: float, schedule: Schedule | None) -> Level:
    """Level at the share r of a step in ln(sigma/alpha), on the process of its two levels.

    t is the schedule's, or lies at the share r between the two where there is none.
    """
    (t, a, s), (t_next, a_next, s_next) = span.now, span.next
    rho = math.exp((1 - r) * math.log(s / a) + r * math.log(s_next / a_next))
    if is_flow(span):
        alpha = 1 / (1 + rho)
    elif a == a_next == 1:
        alpha = 1.0
    else:
        alpha = 1 / math.sqrt(1 + rho * rho)
    told = t + r * (t_next - t) if schedule is None else schedule.time_of(rho)
    return Level(told, alpha, rho * alpha)


def _whole(span: Span) -> bool:
    """Return True for a step without a middle level."""
    return span.next.sigma == 0 or span.now.alpha == 0


def _at_end(r: float) -> bool:
    return abs(r - 1) < 1e-9


def _ratio(level: Level) -> float:
    return level.sigma / level.alpha
