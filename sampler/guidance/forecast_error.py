"""The error criterion of `forecast`: leave a step out while the estimated error stays small.

Flags and sums are kept per sample, float64 [B] on the CPU; the curvature is computed beside the
latents and read once per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from sampler_kernels import recorded, where

from sampler.guidance.forecast_history import ForecastHistory
from sampler.types import Lin, Prediction, Span


class ErrorState(NamedTuple):
    """curvature: κ [B], NaN where unknown; spent: Σ est since the last evaluation, [B];
    run: steps left out since then, [B]. None before the first two evaluations."""

    curvature: Any = None
    spent: Any = None
    run: Any = None


@dataclass(frozen=True)
class ErrorCriterion:
    """Leaves a step out while the summed estimate since the last evaluation is <= tolerance.

        κ   = rms(q̂_1 − q) / (d·(d + D))                at an evaluated step
        est = κ·d·(d + D)·|∂x'/∂q|                      at a later one

    d: distance of the clocks to the newest node, D: between the newest two. q̂_1, the line through
    two nodes, is the estimator whatever order is used, as in embedded Runge-Kutta pairs.
    """

    tolerance: float
    longest: int

    def start(self) -> ErrorState:
        return ErrorState()

    def due(
        self, clock: float, span: Span, space: str, history: ForecastHistory, state: Any
    ) -> Any:
        """True for all samples, or bool [B] on the CPU."""
        if state.curvature is None or len(history.values) < 2:
            return True
        est = self._estimate(clock, span, space, history, state)
        return ~((state.spent + est <= self.tolerance) & (state.run < self.longest))

    def after(
        self,
        clock: float,
        span: Span,
        space: str,
        history: ForecastHistory,
        state: ErrorState,
        due: Any,
        fresh: Any,
        pred: Prediction | None,
    ) -> ErrorState:
        """The next state. due: bool, or bool [B]; fresh: samples whose history was dropped."""
        import torch

        if pred is None:
            est = self._estimate(clock, span, space, history, state)
            return state._replace(spent=state.spent + est, run=state.run + 1)
        if fresh is True or len(history.values) < 2:
            return ErrorState()
        rms, weight = history.miss(pred, clock, space)
        rows = pred.x.shape[0]
        weight = torch.as_tensor(weight).expand(rows)
        if not isinstance(fresh, bool):
            weight = torch.where(fresh, math.nan, weight)
        curvature = rms / recorded(weight, Lin.of(pred.x).like)
        zero = torch.zeros(rows, dtype=torch.float64)
        if due is True or state.curvature is None:
            return ErrorState(curvature, zero, zero)
        est = self._estimate(clock, span, space, history, state)
        flags = recorded(due, Lin.of(pred.x).like)
        return ErrorState(
            where(flags > 0.5, curvature, state.curvature),
            torch.where(due, zero, state.spent + est),
            torch.where(due, zero, state.run + 1),
        )

    def _estimate(
        self, clock: float, span: Span, space: str, history: ForecastHistory, state: Any
    ) -> Any:
        import torch

        kind = history.kind if space == "native" else space
        times = history.times
        d, between = clock - times[:, 0], times[:, 0] - times[:, 1]
        gain = abs(gain_of(kind, span))
        curvature = state.curvature.detach().to("cpu", torch.float64)
        return curvature * torch.as_tensor(d * (d + between)) * gain


def gain_of(kind: str, span: Span) -> float:
    """∂x'/∂q of the DDIM step x' = alpha'·x0 + sigma'·eps, for a prediction of this kind."""
    a, s, a_next, s_next = span.now.alpha, span.now.sigma, span.next.alpha, span.next.sigma
    if kind == "eps":
        return s_next - a_next * s / a if a else math.inf
    if kind == "x0":
        return a_next - s_next * a / s if s else math.inf
    return (s_next * a - a_next * s) / (a * a + s * s if kind == "v" else a + s)
