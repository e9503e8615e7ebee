"""Adaptive guidance: drop the unconditional branch once it agrees with the conditional one.

A sample is *live* at a step where its unconditional branch is evaluated. All samples start live; a
sample that has converged is latched, and from then on live only at its refreshes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge, Le

from sampler.core.binding import GuidanceContext
from sampler.core.regime import regime
from sampler.guidance.adaptive_state import AdaptiveState, initial_decision, next_decisions
from sampler.guidance.host_copy import start_copy, wait
from sampler.guidance.spaces import (
    choose,
    choose_prediction,
    choose_state,
    cosine,
    in_space,
)
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Lin, Prediction, Span

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.core.regime import regime

Cosine = Annotated[float, Ge(-1), Le(1), DocInfo("a cosine")]


@register("guidance", "adaptive")
@dataclass(frozen=True)
class Adaptive(GuidanceBase):
    """Adaptive guidance: any rule over c and u, without evaluating a u that has converged to c.

        γ = <c, u> / (‖c‖·‖u‖)      per sample, over all elements

    The first step with γ > threshold is still guided; from the next one on the sample is latched
    for the rest of the run. With after="drop" (the paper's) it takes g = c. With after="hold" the
    rule gets u = c − d, d being the direction c − u of the sample's last evaluated pair. Latched
    samples leave the unconditional batch, which makes the batch cheaper.

    rule: the guidance rule to make cheaper: `cfg`, `apg`, `cfg_zero` or `linear_ag`.
    threshold: of γ; 0.991 is the paper's, 1 disables latching. Thresholds do not carry
        over between models (arXiv:2506.08351).
    lag: 0 decides with the last step's γ, and waits for the device to compute it; 1 decides with
        the γ of the step before that, without waiting, at the cost of at most one evaluation.
    after: "drop" or "hold".
    refresh: a latched sample evaluates its pair again every `refresh` steps; 0 is never. None is 0
        for "drop" and 3 for "hold", whose direction becomes outdated. Our addition.
    turn: a sample whose direction at a refresh has a cosine below `turn` with the held one is
        refreshed again at the next step. None is off. Our addition.
    space: where γ is measured; "auto" is the network's own output, and eps for x0-predictions. The
        paper has eps-predictions; for a v-prediction at zero terminal SNR the γ of eps starts at 1.
    compact: "rows" leaves converged samples out one by one; "batch" leaves the unconditional batch
        out when all samples have converged (constant shapes). The images are the same.

    Deviations: for networks that do not predict eps a sample latches only after its γ has been at
    or below the threshold once, since their γ may start at 1; γ = 0 where c or u is 0.
    """

    rule: Any = field(default="cfg", metadata={"kind": "guidance"})
    threshold: Cosine = 0.991
    lag: Literal[0, 1] = 0
    after: Literal["drop", "hold"] = "drop"
    refresh: Annotated[int, Ge(0), DocInfo("0 is never")] | None = None
    turn: Cosine | None = None
    space: Literal["auto", "native", "eps", "v", "x0", "velocity"] = "auto"
    compact: Literal["rows", "batch"] = "rows"

    reference: ClassVar[str] = (
        "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models "
        "(Castillo et al., 2023), arXiv:2312.12487"
    )

    def __post_init__(self) -> None:
        if self.turn is not None and not self._period():
            raise ValueError("adaptive: turn takes effect at refreshes; give refresh as well.")
        inner = type(self.rule).name
        if inner == "forecast":
            raise ValueError("adaptive: put forecast outside: forecast(rule=adaptive(...)).")
        if inner in ("adaptive", "sum") or not self.rule.needs <= {"cond", "uncond"}:
            raise ValueError(
                f"adaptive: rule = {inner!r} must combine the conditional and the "
                "unconditional prediction, such as cfg or apg; put adaptive inside sum instead."
            )
        if self.after == "hold" and inner == "linear_ag":
            raise ValueError(
                "adaptive: linear_ag predicts what after='hold' holds; use one of the two."
            )

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def check(self, adapter: Any) -> None:
        self.rule.check(adapter)

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Adaptive, Cond]:
        rule, cond = self.rule.bind(context, cond)
        return (self if rule is self.rule else replace(self, rule=rule)), cond

    def start(self, cond: Cond) -> AdaptiveState:
        pending = (initial_decision(self._period()),) * (1 + self.lag)
        return AdaptiveState(self.rule.start(cond), pending)

    def plan(self, x: Any, span: Span, cond: Cond, state: AdaptiveState) -> Mapping[str, Branch]:
        branches = dict(self.rule.plan(x, span, cond, state.rule))
        start_copy(state.pending[-1].live)  # with lag = 1 it is waited for one step later
        if not branches.keys() >= {"cond", "uncond"}:
            return branches
        live = wait(state.pending[0].live)
        if live is None or live.all():
            return branches
        if not live.any():
            return {"cond": branches["cond"]}
        if self.compact == "rows":
            branches["uncond"] = replace(branches["uncond"], rows=live)
        return branches

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: AdaptiveState
    ) -> tuple[Prediction, AdaptiveState]:
        planned = self.rule.plan(x, span, _BRANCH_PROBE, state.rule)
        if not planned.keys() >= {"cond", "uncond"}:  # the inner rule is off at this step
            return self._unguided(x, preds, span, state)
        cond, live = preds["cond"], state.pending[0].live
        direction, cosines = None, ()
        if "uncond" in preds:
            direction = cond.out - preds["uncond"].out
            cosines = self._cosines(cond, preds["uncond"], direction, state.direction)
        held = direction
        if state.direction is not None and not isinstance(live, float):
            old = Lin.of(state.direction)
            held = old if direction is None else choose(live, direction, old)
            if self.after == "hold":
                stale = cond.out - old
                uncond = stale if direction is None else choose(live, preds["uncond"].out, stale)
                preds = {**preds, "uncond": cond.like(uncond)}
        pred, inner = self._guided(x, preds, span, state, live)
        may_latch = float(cond.kind == "eps") if state.may_latch is None else state.may_latch
        settings = (self.threshold, self.turn, self._period())
        pending, may_latch = next_decisions(state.pending, may_latch, cosines, settings)
        keeps = self.after == "hold" or self.turn is not None
        return pred, AdaptiveState(inner, pending, may_latch, held if keeps else None)

    def regime(self, x: Any, span: Span, state: AdaptiveState) -> dict[str, Any]:
        """Branches that g is made of; see `sampler.core.regime.regime`.

        A held direction replaces the unconditional branch without a jump; a dropped one does not.
        """
        found = regime(self.rule, x, span, state.rule)
        if self.after == "drop" and "uncond" in found:
            found["uncond"] = wait(state.pending[0].live)
        return found

    def _unguided(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: AdaptiveState
    ) -> tuple[Prediction, AdaptiveState]:
        """The inner rule without a pair; dropped samples still take g = c."""
        pred, inner = self.rule.combine(x, preds, span, state.rule)
        latched = state.pending[0].latched
        if self.after == "drop" and not isinstance(latched, float) and "cond" in preds:
            cond = preds["cond"]
            pred = choose_prediction(1 - latched, cond.like(in_space(pred, cond.kind)), cond)
        return pred, state._replace(rule=inner)

    def _guided(
        self,
        x: Any,
        preds: Mapping[str, Prediction],
        span: Span,
        state: AdaptiveState,
        live: float | Tensor,
    ) -> tuple[Prediction, Any]:
        """The inner rule; for "drop" g = c and an unchanged inner state where samples are not live.

        Always in the network's parametrisation, so that a sample's bits do not depend on which
        others were dropped.
        """
        cond = preds["cond"]
        if "uncond" not in preds:
            return cond, state.rule
        pred, inner = self.rule.combine(x, preds, span, state.rule)
        pred = cond.like(in_space(pred, cond.kind))
        if self.after == "hold" or isinstance(live, float):
            return pred, inner
        return choose_prediction(live, pred, cond), choose_state(live, inner, state.rule)

    def _period(self) -> int:
        if self.refresh is not None:
            return self.refresh
        return HOLD_REFRESH if self.after == "hold" else 0

    def _cosines(
        self, cond: Prediction, uncond: Prediction, direction: Lin, held: Any
    ) -> tuple[Tensor, ...]:
        """(γ,), each [B]; with `turn` and a held direction also the cosine of new and held."""
        space = self.space
        if space == "auto":
            space = "eps" if cond.kind == "x0" else "native"
        gamma = cosine(in_space(cond, space), in_space(uncond, space))
        if self.turn is None or held is None:
            return (gamma,)
        return gamma, cosine(direction, Lin.of(held))


_BRANCH_PROBE = Cond()  # for the names of a plan's branches
HOLD_REFRESH = 3
"""Steps between refreshes of a held direction (docs/guidance.md)."""
