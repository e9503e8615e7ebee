"""Two evaluations per step, as two steps on a longer grid.

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
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sampler.core.binding import SamplerContext
from sampler.samplers.coordinates import is_flow, log_snr
from sampler.samplers.exponential import carried, falling, line, noisy
from sampler.samplers.shares import KEPT, NoiseKind, Share, effective, refuse_rows, share
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span

if TYPE_CHECKING:
    from sampler.core.schedule import Schedule


class TwoStageState(NamedTuple):
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
    noise: NoiseKind
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
        if undivided(span):
            k, fresh = share(self.policy, span, self.eta)
            return noisy(self, line(pred, span, k=k), span, fresh, ())
        return self._first(pred, span)

    def place(self, span: Span) -> float:
        """The place of the middle level in a step 0..1, in ln(sigma/alpha)."""
        raise NotImplementedError

    def combined(self, r: float, H: float) -> tuple[float, ...]:
        """Weights of the two predictions."""
        raise NotImplementedError

    def _first(self, pred: Prediction, span: Span) -> Move:
        k, fresh = share(self.policy, span, self.eta)
        mean = line(pred, span, k=k)
        drawn = mean if self.s_noise * fresh else None
        return noisy(self, mean, span, fresh, TwoStageState(pred.x, pred.x0, span.now, drawn, k))

    def _second(self, pred: Prediction, whole: Span, span: Span, half: TwoStageState) -> Move:
        k, _ = share(self.policy, whole, self.eta)
        start, middle, end = (log_snr(v) for v in (half.level, span.now, whole.next))
        r = (middle - start) / (end - start)
        w_0, w_1 = self.combined(r, effective(end - start, k))
        mean = carried(half.x, whole, w_0 * Lin.of(half.x0) + w_1 * pred.x0, k)
        # at r = 1 no noise is left to draw: a rounded k would leave some
        kept, fresh = KEPT if at_end(r) else self._rest(span, half, k)
        if half.mean is not None:
            drawn = pred.x - Lin.of(half.mean)
            mean = mean + (kept * span.next.sigma / span.now.sigma) * drawn
        return noisy(self, mean, span, fresh, ())

    def _rest(self, span: Span, half: TwoStageState, k: float) -> Share:
        """k_2 = k/k_1 and sqrt(1 − k_2²) of the second half."""
        return share(self.policy, span, self.eta)

    def _middle(self, span: Span) -> Level:
        r = self.place(span)
        return span.next if at_end(r) else between(span, r, self._schedule)

    def _middle_of_rows(self, now: Level, after: Level) -> Level | None:
        """The middle level, None for a step without; of level tensors [B] one for each sample.

        There a sample without a middle level makes its step in the first half and waits.
        """
        if isinstance(now.sigma, (int, float)):
            return None if undivided(Span(0, now, after)) else self._middle(Span(0, now, after))
        import torch

        from sampler.core.rows import of_rows

        steps = [Span(0, a, b) for a, b in zip(of_rows(now), of_rows(after), strict=True)]
        halved = [span.now != span.next and not undivided(span) for span in steps]
        if not any(halved):
            return None
        found = [
            self._middle(span) if half else span.next
            for span, half in zip(steps, halved, strict=True)
        ]
        return Level(*(torch.tensor(v, dtype=torch.float64) for v in zip(*found, strict=True)))


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


def undivided(span: Span) -> bool:
    """Return True for a step without a middle level."""
    return span.next.sigma == 0 or span.now.alpha == 0


def at_end(r: float) -> bool:
    return abs(r - 1) < 1e-9


def ratio(level: Level) -> float:
    return level.sigma / level.alpha
