"""UniPC, and its step with momentum, which `heavy_ball` uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from sampler.registry import register
from sampler.samplers.exponential import Clock, Rule, carried, clock_of, falling
from sampler.samplers.momentum import damped
from sampler.samplers.multistep_weights import flat, simple, weights
from sampler.samplers.predictor_corrector import CorrectorState, target
from sampler.samplers.shares import refuse_rows
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span

Compat = Literal["clean", "published"]
Variant = Literal["bh1", "bh2"]
TWO_NODES: dict[str, Rule] = {"bh1": simple, "bh2": flat}


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
    return Move(mean, 0.0, CorrectorState(x, span.now, history, 1.0, None, number, p, kept))


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

    def error_term(self, pred: Prediction, move: Move, span: Span, state: Any) -> Lin | None:
        return move.state.x - pred.x if state and move.state else None

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        return (1.0,)  # corrected − predicted
