"""SA-Solver: a stochastic predictor-corrector on x0."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from sampler.registry import register
from sampler.registry.constraints import Nonnegative
from sampler.samplers.exponential import History, Rule, carried, clock_of, falling, noisy
from sampler.samplers.multistep_weights import simple, weights
from sampler.samplers.predictor_corrector import CorrectorState, target
from sampler.samplers.shares import NoiseKind, refuse_rows, share
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


@register("sampler", "sa_solver")
@dataclass(frozen=True)
class SASolver(SamplerBase):
    """SA-Solver: stochastic Adams predictor and corrector on the predicted x0.

        x' = c·x + (alpha' − c·alpha)·sum_j w_j·m_j + s_noise·sigma'·sqrt(1 − k²)·z
        c = k·sigma'/sigma,   k = e^{−tau²·h},   w with the kernel e^{Hs}, H = (1 + tau²)·h

    The next evaluation repeats the step with its own m first among the nodes; the drawn noise
    stays. tau = eta inside the interval and 0 outside. The number of nodes falls at the end.

    predictor_order: 1 to 5; 3 by default. corrector_order: 0 (no corrector) to 5; 4 by default.
        The authors advise 3 and 4 for weak guidance, and lower ones for strong guidance.
    eta: tau, amount of noise; 0 is deterministic; 1 by default.
    interval: (low, high), the times t' (the network's time input at the level that a step leads to)
        at which noise is drawn; (200, 800) by default.
    simple_order_2: whether two nodes have the weights −(H/2)/(1 − e^{−H})/s and the rest, as in
        diffusers.
    pece: whether the network is evaluated again after every correction: 2n − 1 evaluations.
    s_noise: factor on the noise; 1 keeps the level's amount.
    noise: as for `ddim`.
    """

    predictor_order: Annotated[int, Ge(1), Le(5)] = 3
    corrector_order: Annotated[int, Ge(0), Le(5)] = 4
    eta: Nonnegative = 1.0
    interval: tuple[float, float] = (200.0, 800.0)
    simple_order_2: bool = False
    pece: bool = False
    s_noise: Nonnegative = 1.0
    noise: NoiseKind = "step"

    reference: ClassVar[str] = "SA-Solver (Xue et al., 2023), arXiv:2309.05019, Algorithm 1"

    def __post_init__(self) -> None:
        if self.interval[0] > self.interval[1]:
            raise ValueError(
                f"sa_solver: interval = {list(self.interval)} must be (low, high), low <= high."
            )

    @property
    def convergence(self) -> float | None:
        return (
            None if self.stochastic else float(min(2, self.corrector_order or self.predictor_order))
        )

    @property
    def evaluations(self) -> int:
        return 2 if self.pece else 1

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid, with `pece` every inner level twice. Raises ValueError if it does not fall."""
        falling("sa_solver", grid)
        if not self.pece:
            return grid
        return (grid[0], *(level for level in grid[1:-1] for _ in range(2)), grid[-1])

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        refuse_rows(span)
        again = self.pece and span.now == span.next
        number = state.number + 1 if state else 0
        left = self._count(span) - number
        x = pred.x
        if state and state.level != span.now and self.corrector_order:
            x = self._corrected(pred, span, state, left)
        if again:  # the network is evaluated here once more
            return Move(x, 0.0, state._replace(level=span.now))
        history = state.history if state else ()
        history = ((clock_of(span, "snr")(span.now), pred.x0), *history)
        return self._predicted(x, pred, span, history[: self._kept], number, left)

    def error_term(self, pred: Prediction, move: Move, span: Span, state: Any) -> Lin | None:
        arrived = state and state.level != span.now  # not the second evaluation of `pece`
        if not (arrived and self.corrector_order and move.state):
            return None
        again = self.pece and span.now == span.next
        return Lin.of(move.mean if again else move.state.x) - pred.x

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        return (1.0,)  # corrected − predicted

    @property
    def _kept(self) -> int:
        return max(self.predictor_order, self.corrector_order - 1)

    def _count(self, span: Span) -> int:
        """Number of steps between different levels; without end where it is not known."""
        total = span.total or sys.maxsize
        return (total + 1) // 2 if self.pece else total

    def _rule(self) -> Rule:
        return simple if self.simple_order_2 else weights

    def _corrected(self, pred: Prediction, span: Span, state: CorrectorState, left: int) -> Lin:
        count = min(self.corrector_order, len(state.history) + 1, left)
        D, end = pred.x0, clock_of(span, "snr")(span.now)
        e = D if count == 1 else target(state.history[: count - 1], end, state.k, self._rule(), D)
        x = carried(state.x, Span(0, state.level, span.now), e, state.k)
        return x if state.mean is None else x + (pred.x - Lin.of(state.mean))

    def _predicted(
        self, x: Lin, pred: Prediction, span: Span, history: History, number: int, left: int
    ) -> Move:
        if span.next.sigma == 0:
            return Move(span.next.alpha * pred.x0, 0.0, ())
        tau = self.eta if self.interval[0] <= span.next.t <= self.interval[1] else 0.0
        k, fresh = share("sde", span, tau**2)
        p = max(1, min(self.predictor_order, len(history), left - 1))
        e = target(history[:p], clock_of(span, "snr")(span.next), k, self._rule())
        mean = carried(x, span, e, k)
        drawn = mean if self.s_noise * fresh else None
        state = CorrectorState(x, span.now, history, k, drawn, number, p)
        return noisy(self, mean, span, fresh, state)
