"""Adaptive guidance: skip the unconditional evaluation once both predictions agree.

A row is *live* at a step where its unconditional prediction is really evaluated and used. All rows
start live; a row that has converged is latched, and from then on live only at its refreshes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import DocInfo, Ge, Le

from sampler.core.binding import GuidanceContext
from sampler.core.regime import regime
from sampler.guidance.adaptive_state import StepFlags, advance, initial
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

Cosine = Annotated[float, Ge(-1), Le(1), DocInfo("a cosine")]


class AdaptiveState(NamedTuple):
    """rule: the inner rule's state.

    coming: the decisions of the next 1 + lag guided steps, taken where x is: on its device.
    armed: 1 where a row may latch, else 0, as the flags there; None before the first guided step.
    held: c − u of the last live step, per row [B, ...] (after="hold", or with `turn`), or None.
    """

    rule: Any
    coming: tuple[StepFlags, ...]
    armed: Any = None
    held: Any = None


@register("guidance", "adaptive")
@dataclass(frozen=True)
class Adaptive(GuidanceBase):
    """Adaptive guidance: any rule over c and u, skipping u where it would change nothing.

        γ = <c, u> / (‖c‖·‖u‖)      per row, over all elements

    The first step with γ > threshold is still guided with both evaluations; from the next step on
    the row is latched for the rest of the run. With after="drop" (the paper's) it takes g = c. With
    after="hold" the rule goes on with u = c − d, d being the direction c − u of the row's last real
    pair. Latched rows leave the unconditional batch, so that a batch really gets cheaper.

    rule: the rule whose cost is reduced: `cfg`, `apg`, `cfg_zero` or `linear_ag`.
    threshold: γ in −1..1, 0.991 is the paper's; 1 switches the rule off. Thresholds do not carry
        over between models (arXiv:2506.08351).
    lag: 0 decides with the last step's γ, and waits for the device to compute it; 1 decides with
        the γ of the step before that, which is available by then, at the cost of at most one more
        evaluation.
    after: "drop" or "hold".
    refresh: a latched row evaluates its pair again every `refresh` steps; 0 is never. By default 0
        for "drop" and 3 for "hold", whose direction goes stale. Our addition.
    turn: cosine in −1..1; a row whose direction has turned below it at a refresh is refreshed again
        at the next step. None is off. Our addition.
    space: where γ is measured; "auto" is the network's own output, and eps for x0-predictions. The
        paper has eps-predictions; for a v-prediction at zero terminal SNR the γ of eps starts at 1.
    compact: "rows" leaves converged rows out one by one; "batch" leaves the whole unconditional
        batch out when all rows have converged (constant shapes). The images are the same.

    Deviations: for networks that predict something else than eps a row latches only after its γ
    has been at or below the threshold once, since their γ may start at 1; γ = 0 where c or u is 0.
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
            raise ValueError("adaptive: turn is checked at refreshes only; set refresh as well.")
        inner: str = self.rule.name
        if inner == "cfg_pp" and self.after == "drop":
            raise ValueError(
                "adaptive: after = 'drop' takes the conditional prediction, which breaks cfg_pp's "
                "pair of target and direction; use after = 'hold'."
            )
        if inner == "forecast":
            raise ValueError("adaptive: put forecast outside: forecast(rule=adaptive(...)).")
        if inner in ("adaptive", "sum") or not self.rule.needs <= {"cond", "uncond"}:
            raise ValueError(
                f"adaptive: rule = {inner!r} must be one over the conditional and the "
                "unconditional prediction, such as cfg or apg; put adaptive inside sum instead."
            )
        if self.after == "hold" and inner == "linear_ag":
            raise ValueError(
                "adaptive: linear_ag predicts what after='hold' holds; use one of the two."
            )

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Adaptive, Cond]:
        """The inner rule bound to the run; see `sampler.core.binding`."""
        rule, cond = self.rule.bind(context, cond)
        return (self if rule is self.rule else replace(self, rule=rule)), cond

    def start(self, cond: Cond) -> AdaptiveState:
        return AdaptiveState(self.rule.start(cond), (initial(self._period()),) * (1 + self.lag))

    def plan(self, x: Any, span: Span, cond: Cond, state: AdaptiveState) -> Mapping[str, Branch]:
        branches = dict(self.rule.plan(x, span, cond, state.rule))
        # With lag = 1 the copy that is started here is waited for one step later.
        start_copy(state.coming[-1].live)
        if not branches.keys() >= {"cond", "uncond"}:
            return branches
        live = wait(state.coming[0].live)
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
        planned = self.rule.plan(x, span, _ASKED, state.rule)
        if not planned.keys() >= {"cond", "uncond"}:  # the inner rule does not guide here
            return self._resting(x, preds, span, state)
        cond, live = preds["cond"], state.coming[0].live
        direction, cosines = None, ()
        if "uncond" in preds:
            direction = cond.out - preds["uncond"].out
            cosines = self._cosines(cond, preds["uncond"], direction, state.held)
        held = direction
        if state.held is not None and not isinstance(live, float):
            old = Lin.of(state.held)
            held = old if direction is None else choose(live, direction, old)
            if self.after == "hold":
                stale = cond.out - old
                uncond = stale if direction is None else choose(live, preds["uncond"].out, stale)
                preds = {**preds, "uncond": cond.like(uncond)}
        pred, inner = self._guided(x, preds, span, state, live)
        armed = float(cond.kind == "eps") if state.armed is None else state.armed
        settings = (self.threshold, self.turn, self._period())
        coming, armed = advance(state.coming, armed, cosines, settings)
        keeps = self.after == "hold" or self.turn is not None
        return pred, AdaptiveState(inner, coming, armed, held if keeps else None)

    @property
    def sets_direction(self) -> bool:
        """Return True if the inner rule keeps a direction apart from its target."""
        return self.rule.sets_direction

    def regime(self, x: Any, span: Span, state: AdaptiveState) -> dict[str, Any]:
        """The branches that g is made of; see `sampler.core.regime.regime`.

        A held direction replaces the unconditional branch without a jump; a dropped one does not.
        """
        found = regime(self.rule, x, span, state.rule)
        if self.after == "drop" and "uncond" in found:
            found["uncond"] = wait(state.coming[0].live)
        return found

    def _resting(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: AdaptiveState
    ) -> tuple[Prediction, AdaptiveState]:
        """Return the inner rule's prediction without a pair; dropped rows still take g = c."""
        pred, inner = self.rule.combine(x, preds, span, state.rule)
        latched = state.coming[0].latched
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
        live: Any,
    ) -> tuple[Prediction, Any]:
        """The inner rule; for "drop" g = c and an unchanged inner state in rows that are not live.

        Always in the network's parametrisation, so that a row's bits do not depend on which rows
        around it were dropped.
        """
        cond = preds["cond"]
        if "uncond" not in preds:
            return cond, state.rule
        pred, inner = self.rule.combine(x, preds, span, state.rule)
        if pred.kind != cond.kind:
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
    ) -> tuple[Any, ...]:
        """(γ,), each [B]; with `turn` and a held direction also the cosine of new and held."""
        space = self.space
        if space == "auto":
            space = "eps" if cond.kind == "x0" else "native"
        gamma = cosine(in_space(cond, space), in_space(uncond, space))
        if self.turn is None or held is None:
            return (gamma,)
        return gamma, cosine(direction, Lin.of(held))


_ASKED = Cond()  # for the names of a plan's branches alone
HOLD_REFRESH = 3
"""Steps between refreshes of a held direction: the best of a trial (docs/guidance_study.md)."""
