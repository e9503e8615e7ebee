"""Forecast guidance: steps without a network call, extrapolated from the run's own past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le

from sampler.core.binding import GuidanceContext
from sampler.core.regime import inner_rules, regime
from sampler.guidance.forecast_decision import ForecastDecision
from sampler.guidance.forecast_history import ForecastHistory, choose_due
from sampler.guidance.forecast_settings import check, refuse_sampler, refuse_span, refuse_steps
from sampler.guidance.spaces import Space, choose_state
from sampler.registry import build, register
from sampler.registry.constraints import Count, Fraction, Nonnegative, Positive
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span


class ForecastState(NamedTuple):
    """rule: the inner rule's state; history: its evaluated outputs; regime: the branches that they
    were made of; criterion: what the criterion keeps."""

    rule: Any
    history: ForecastHistory = ForecastHistory()
    regime: Any = None
    criterion: Any = ()


@register("guidance", "forecast")
@dataclass(frozen=True)
class Forecast(GuidanceBase):
    """Any rule, with some of its outputs forecast from earlier ones instead of evaluated.

        evaluated    g = rule(...),   q_0 := g in `space`
        left out     q̂ = Σ_j w_j·q_j,   Σ w_j = 1,   w_j = Π_{k≠j} (τ − τ_k)/(τ_j − τ_k)

    over the newest order + 1 evaluated steps and their clocks τ. A step that is left out costs no
    network call, whatever the rule; the rule's own state rests there. Samples are left out one by
    one. The guided prediction is forecast, so one history serves every rule.

    rule: the rule inside: any but `linear_ag` and another `forecast`.
    when: "error" leaves a step out while its estimated error, summed since the last evaluation, is
        at most `tolerance`: κ·d·(d + D)·|∂x'/∂q|, with κ = rms(q̂ − q)/(d·(d + D)) from the newest
        evaluation, d and D the distances of the clocks (`forecast_error`). "window" (Spectrum's)
        evaluates at distances that grow, known before the run: the mode for CUDA graphs. "change"
        is EasyCache's criterion with its own forecast, out = x + (out_− − x_−) (`forecast_change`).
    policy: one number per step, 1 evaluates and 0 forecasts; it replaces `when`.
    tolerance: of "error", > 0, in standard deviations of the latents x'.
    longest: of "error", the most steps left out in a row.
    threshold: of "change"; a step is left out while the sum of relative changes is below it.
    form: of "change"; "authors" sums a path length, "comfyui" at every step the distance to the
        last evaluation.
    window, growth: of "window": the first distance, and what each evaluation adds to it.
    warmup: steps at the start that are always evaluated, >= 1; None is 4 for "window", else 3.
    last: steps at the end that are always evaluated.
    basis: "polynomial", or "chebyshev": w = X(XᵀX + λI)⁻¹T(z), a ridge regression over all
        evaluated steps as Spectrum's. It keeps every evaluated output.
    order: of the polynomial, 0 (hold) to 3; above 1 only where Σ|w| <= 5, else 1.
    degree, ridge, horizon: of "chebyshev": the highest polynomial, λ, and z = 2·step/horizon − 1.
    blend: of "chebyshev", b in 0..1: b·Chebyshev + (1 − b)·the line through the newest two.
    space: of what is forecast; "eps" was best on the bundled model, "native" is the network's own.
    clock: "index", the step number, or "log_snr", log(alpha/sigma).
    compact: "rows" leaves samples out one by one; "batch" evaluates all where one is due.

    A prediction at alpha = 0 is not a node: its eps is x itself. Where the branches of the rule
    inside change (an interval ends, a sample of `adaptive` is latched) its output jumps: the
    history is dropped, and the step is evaluated. The sampler must evaluate once per step; above
    eta = 0.3 eps is not a smooth function of time, and a warning is given.
    """

    rule: Any = field(default="cfg", metadata={"kind": "guidance"})
    when: Literal["error", "window", "change"] = "error"
    policy: tuple[int, ...] | None = None
    tolerance: Positive = 0.016
    longest: Count = 3
    threshold: Positive = 0.1
    form: Literal["authors", "comfyui"] = "authors"
    window: Annotated[float, Ge(1)] = 2.0
    growth: Nonnegative = 0.5
    warmup: Count | None = None
    last: Annotated[int, Ge(0)] = 1
    basis: Literal["polynomial", "chebyshev"] = "polynomial"
    order: Annotated[int, Ge(0), Le(3)] = 2
    degree: Annotated[int, Ge(0)] = 4
    ridge: Positive = 0.1
    horizon: Positive = 50.0
    blend: Fraction = 1.0
    space: Space = "eps"
    clock: Literal["index", "log_snr"] = "index"
    compact: Literal["rows", "batch"] = "rows"

    reference: ClassVar[str] = (
        "ours (error per sample); windows and Chebyshev basis: Spectrum, hanjq17/Spectrum; change: "
        "EasyCache, H-EmbodVis/EasyCache"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", build("guidance", self.rule))
        if self.policy is not None:
            object.__setattr__(self, "policy", tuple(self.policy))
        check(self)
        for inner in inner_rules(self.rule):
            if inner == "linear_ag":
                raise ValueError(
                    "forecast: linear_ag predicts from every step's outputs, and forecast leaves "
                    "steps out; use one of the two."
                )
            if inner == "forecast":
                raise ValueError("forecast: a forecast inside another one; keep the outer one.")

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def sets_direction(self) -> bool:
        """Return True if the inner rule keeps a direction apart from its target."""
        return self.rule.sets_direction

    @property
    def graph_refusal(self) -> str:
        """Reason that runs cannot be CUDA graphs; "" where they can."""
        if self.policy is None and self.when != "window":
            return f"forecast: when = {self.when!r} decides on the host; give it when='window'"
        return ""

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Forecast, Cond]:
        """The rule inside bound to the run; see `sampler.core.binding`.

        Raises ValueError for a sampler that forecasts do not work with, and too few steps.
        """
        refuse_sampler(context)
        refuse_steps(self, len(context.levels))
        rule, cond = self.rule.bind(context, cond)
        return (self if rule is self.rule else replace(self, rule=rule)), cond

    def start(self, cond: Cond) -> ForecastState:
        return ForecastState(self.rule.start(cond), criterion=self.decision.start())

    def plan(self, x: Any, span: Span, cond: Cond, state: ForecastState) -> Mapping[str, Branch]:
        refuse_span(self, span, state)
        due, _ = self.decision.due(x, span, state)
        if due is False:
            return {}
        branches = self.rule.plan(x, span, cond, state.rule)
        if due is True:
            return branches
        found: dict[str, Branch] = {}
        for name, branch in branches.items():
            rows = due if branch.rows is None else due & branch.rows
            if rows.any():
                found[name] = replace(branch, rows=rows)
        return found

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: ForecastState
    ) -> tuple[Prediction, ForecastState]:
        decision = self.decision
        due, fresh = decision.due(x, span, state)
        if due is False:
            criterion = decision.after(x, span, state, due, fresh, None)
            return decision.forecast(x, span, state), state._replace(criterion=criterion)
        pred, rule = self.rule.combine(x, preds, span, state.rule)
        criterion = decision.after(x, span, state, due, fresh, pred)
        history = decision.kept(pred, span, state.history, due, fresh)
        if due is not True:
            pred = choose_due(due, pred, decision.forecast(x, span, state))
            rule = choose_state(due, rule, state.rule)
        made = regime(self.rule, x, span, state.rule)
        return pred, ForecastState(rule, history, made, criterion)

    @property
    def warmup_steps(self) -> int:
        """Steps at the start that are always evaluated."""
        if self.warmup is not None:
            return self.warmup
        return 4 if self.when == "window" else 3

    @property
    def decision(self) -> ForecastDecision:
        """The criterion, the history and the weights of these settings."""
        return ForecastDecision(self)
