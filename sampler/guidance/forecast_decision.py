"""Decisions of `forecast`: the samples that a step evaluates, and forecasts of the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sampler.core.regime import differing, regime
from sampler.guidance.forecast_change import ChangeCriterion, ChangeState
from sampler.guidance.forecast_error import ErrorCriterion, ErrorState
from sampler.guidance.forecast_history import ForecastHistory
from sampler.guidance.forecast_weights import chebyshev, polynomial, windowed
from sampler.types import Level, Prediction, Span

Flags = Any  # bool for all samples, or bool [B]


@dataclass(frozen=True)
class ForecastDecision:
    """The criterion, the history and the weights of a rule's settings; rule: the `Forecast`."""

    rule: Any

    def start(self) -> Any:
        """The criterion's first state."""
        if self.rule.policy:
            return ()
        return {"error": ErrorState(), "change": ChangeState()}.get(self.rule.when, ())

    def due(self, x: Any, span: Span, state: Any) -> tuple[Flags, Flags]:
        """(samples to evaluate, samples whose branches have changed)."""
        rule = self.rule
        if state.regime is None:
            return True, False
        fresh = differing(state.regime, regime(rule.rule, x, span, state.rule))
        if rule.policy is not None:
            return bool(rule.policy[span.index]), fresh
        ends = span.total and span.index >= span.total - rule.last
        known = self._changes or bool(state.history.values)
        if fresh is True or span.index < self.rule.warmup_steps or ends or not known:
            return True, fresh
        if rule.when == "window":
            due = windowed(span.index + 1, self.rule.warmup_steps, rule.window, rule.growth, 0)[
                span.index
            ]
        elif self._changes:
            due = self._change.due(x, state.criterion)
        else:
            time, kept = self._time(span), state.history
            due = self._error.due(time, span, rule.space, kept, state.criterion)
        return _together(due, fresh, rule.compact == "batch"), fresh

    def forecast(self, x: Any, span: Span, state: Any) -> Prediction:
        """The prediction of a step that is left out."""
        if self._changes:
            return self._change.forecast(x, span.now, state.criterion)
        weights = self._weights(self._time(span))
        return state.history.forecast(x, span.now, self.rule.space, weights)

    def kept(
        self, pred: Prediction, span: Span, history: ForecastHistory, due: Flags, fresh: Flags
    ) -> ForecastHistory:
        """The history with an evaluated prediction."""
        if self._changes:
            return history
        size = self.rule.order + 1 if self.rule.basis == "polynomial" else None
        return history.kept(pred, self._time(span), self.rule.space, due, fresh, size)

    def after(
        self, x: Any, span: Span, state: Any, due: Flags, fresh: Flags, pred: Prediction | None
    ) -> Any:
        """The criterion's next state."""
        rule = self.rule
        if rule.policy is not None or rule.when == "window":
            return ()
        if self._changes:
            return self._change.after(x, state.criterion, due, fresh, pred, span.index)
        time, kept = self._time(span), state.history
        return self._error.after(time, span, rule.space, kept, state.criterion, due, fresh, pred)

    def _weights(self, time: float) -> Callable[[Any], Any]:
        rule = self.rule
        if rule.basis == "chebyshev":
            settings = (time, rule.degree, rule.ridge, rule.horizon, rule.blend)
            return lambda clocks: chebyshev(clocks, *settings)
        return lambda clocks: polynomial(clocks, time, rule.order)

    def _time(self, span: Span) -> float:
        return float(span.index) if self.rule.clock == "index" else _log_snr(span.now)

    @property
    def _changes(self) -> bool:
        return self.rule.policy is None and self.rule.when == "change"

    @property
    def _error(self) -> ErrorCriterion:
        return ErrorCriterion(self.rule.tolerance, self.rule.longest)

    @property
    def _change(self) -> ChangeCriterion:
        return ChangeCriterion(self.rule.threshold, self.rule.form, self.rule.warmup_steps)


def _together(due: Flags, fresh: Flags, batch: bool) -> Flags:
    """The samples that one of two flags names; True or False where they agree, or must."""
    if not isinstance(fresh, bool):
        due = fresh | due
    if isinstance(due, bool):
        return due
    if due.all() or (batch and due.any()):
        return True
    return due if due.any() else False


def _log_snr(level: Level) -> float:
    if not level.alpha or not level.sigma:
        return math.nan
    return math.log(level.alpha / level.sigma)
