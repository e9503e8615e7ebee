"""UniPC and SA-Solver: a prediction, corrected by the evaluation that the next step makes anyway.

    corrected = c·x_0 + (alpha − c·alpha_0)·sum_j w_j·D_j + (x − mean),   c = k·sigma/sigma_0

repeats the step that led from x_0 to x, with the new D first among the nodes; mean is what was
predicted without the noise that was drawn, which stays. c, k, w as in `exponential.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le

from sampler.registry import register
from sampler.registry.constraints import Nonnegative
from sampler.samplers.exponential import Clock, History, carried, clock_of, combined, falling, noisy
from sampler.samplers.momentum import damped
from sampler.samplers.multistep_weights import flat, places, simple, weights
from sampler.samplers.shares import NoiseKind, effective, refuse_rows, share
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span

Compat = Literal["clean", "published"]
Variant = Literal["bh1", "bh2"]
Rule = Callable[[Sequence[float], float], tuple[float, ...]]
TWO_NODES: dict[str, Rule] = {"bh1": simple, "bh2": flat}


class Before(NamedTuple):
    """The step that led here: where it began, with what history, and how it was made."""

    x: Any  # corrected x [B, ...] at `level`
    level: Level
    history: History  # (u, D) at `level` and before, newest first
    k: float
    mean: Any  # prediction without its noise; None where none was drawn
    number: int  # of the step
    order: int
    velocity: Any = None  # of heavy_ball


def target(history: History, end: float, k: float, rule: Rule, new: Lin | None = None) -> Lin:
    """e of a step from the newest value to the clock `end`; `new`: the value there, if known.

    A value without a clock (alpha = 0) has no weight.
    """
    start = history[0][0]
    known = [(u, D) for u, D in history if math.isfinite(u)] or list(history[:1])
    spots = places([u for u, _ in known], end) if math.isfinite(start) else (0.0,)
    values = [D for _, D in known]
    if new is not None:
        spots, values = (1.0, *spots), [new, *values]
    if len(values) == 1:
        return Lin.of(values[0])
    return combined(rule(spots, effective(end - start, k)), values)


def unipc(
    pred: Prediction,
    span: Span,
    state: Any,
    order: int = 2,
    variant: Variant = "bh2",
    clock: Clock = "snr",
    beta: float = 1.0,
    compat: Compat = "clean",
) -> Move:
    """Correct x with the new x0, then predict; beta < 1 averages the corrector's target."""
    refuse_rows(span)
    D, x, velocity, u = pred.x0, pred.x, None, clock_of(span, clock)
    if state:
        rule = weights if state.order > 1 else TWO_NODES[variant]
        e = target(state.history[: state.order], u(span.now), 1.0, rule, D)
        before = state.velocity
        if before is not None and compat == "published":
            before = (span.now.sigma / state.level.sigma) * Lin.of(before)
        velocity = damped(beta, before, e)
        x = carried(state.x, Span(0, state.level, span.now), velocity)
    history = ((u(span.now), D), *(state.history if state else ()))[: max(2, order)]
    left = span.total - span.index if span.total else order
    if span.next.sigma == 0:
        return Move(span.next.alpha * D, 0.0, ())
    p = min(order, len(history), left)
    rule = weights if p > 2 else TWO_NODES[variant]
    mean = carried(x, span, target(history[:p], u(span.next), 1.0, rule))
    kept = velocity if beta != 1 else None
    number = state.number + 1 if state else 0
    return Move(mean, 0.0, Before(x, span.now, history, 1.0, None, number, p, kept))


@register("sampler", "unipc")
@dataclass(frozen=True)
class UniPC(SamplerBase):
    """UniPC (data prediction): a multistep predictor, corrected by the next evaluation.

        x' = (sigma'/sigma)·x + (alpha' − alpha·sigma'/sigma)·sum_j w_j·m_j
        predictor: m at the last p levels;   corrector: the new m as well, p + 1 nodes

    m = x0. Of p nodes, 3 and more have the weights of the exact kernel of `res_multistep`, as the
    corrector has; two have w_1 = −h/(2·h_before) in the variant bh2 and
    −(h/2)/(1 − e^{−h})·h/h_before in bh1, and so has the corrector of the first step. One
    evaluation per step. p rises from 1 and falls to 1 at the last step.

    order: p, 1 to 3; 2 by default. variant: "bh2" (default) or "bh1".
    clock: as for `dpmpp_2m`; ComfyUI's uni_pc has "sigma".
    """

    order: Annotated[int, Ge(1), Le(3)] = 2
    variant: Variant = "bh2"
    clock: Clock = "snr"

    reference: ClassVar[str] = "UniPC (Zhao et al., 2023), arXiv:2302.04867, Algorithm 5, 6"

    @property
    def convergence(self) -> float:
        return 2.0

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid itself. Raises ValueError for a level that is not below the one before."""
        return falling("unipc", grid)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        return unipc(pred, span, state, self.order, self.variant, self.clock)

    def step_with_error(
        self, x: Any, pred: Prediction, span: Span, state: Any
    ) -> tuple[Move, Lin | None]:
        move = self.step(x, pred, span, state)
        return move, move.state.x - pred.x if state and move.state else None


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
    interval: (low, high), the times t' (as the network is told the level that a step leads to) at
        which noise is drawn; (200, 800) by default.
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

    def step_with_error(
        self, x: Any, pred: Prediction, span: Span, state: Any
    ) -> tuple[Move, Lin | None]:
        move = self.step(x, pred, span, state)
        arrived = state and state.level != span.now  # not the second evaluation of `pece`
        if not (arrived and self.corrector_order and move.state):
            return move, None
        again = self.pece and span.now == span.next
        return move, Lin.of(move.mean if again else move.state.x) - pred.x

    @property
    def _kept(self) -> int:
        return max(self.predictor_order, self.corrector_order - 1)

    def _count(self, span: Span) -> int:
        """Number of steps between different levels; without end where it is not known."""
        total = span.total or sys.maxsize
        return (total + 1) // 2 if self.pece else total

    def _rule(self) -> Rule:
        return simple if self.simple_order_2 else weights

    def _corrected(self, pred: Prediction, span: Span, state: Before, left: int) -> Lin:
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
        state = Before(x, span.now, history, k, drawn, number, p)
        return noisy(self, mean, span, fresh, state)
