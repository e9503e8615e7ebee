"""Coordinates in which deterministic samplers integrate the probability-flow ODE: dz/du = F.

    eps     z = x/alpha   u = sigma/alpha   F = eps         (variance preserving, exploding)
    data    z = x/sigma   u = alpha/sigma   F = x0          (DPM-Solver++, UniPC)
    flow    z = x         u = sigma         F = velocity    (alpha = 1 − sigma)

A step with the sampler's slope e keeps z and moves along e,

    x' = carried·x + gain·e,   carried = dx'/dx, gain = dx'/de:

    eps     alpha'/alpha,   sigma' − alpha'·sigma/alpha
    data    sigma'/sigma,   alpha' − sigma'·alpha/sigma
    flow    1,              sigma' − sigma

The Euler step, e = F, is alpha'·x0 + sigma'·eps in all three and is defined at every level: also at
the first of a zero-terminal-SNR grid (alpha = 0), where z and u of `eps` are undefined, and at the
last (sigma' = 0), where those of `data` are. A first step is Euler's, so it needs no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from sampler.types import Level, Lin, Prediction, Span, on_flow

Coordinate = Literal["eps", "data", "flow"]
Space = Literal["auto", "eps", "data", "flow"]


def space_of(span: Span, space: Space = "auto") -> Coordinate:
    """Coordinate of a step: `auto` is "flow" on flow matching's levels, else "eps"."""
    if space == "auto":
        return "flow" if span.is_flow else "eps"
    return space


def check_space(name: str, space: Space, grid: Sequence[Level]) -> None:
    """Raises ValueError for space "flow" on a grid that is not flow matching's."""
    if space == "flow" and not all(on_flow(level) for level in grid):
        raise ValueError(
            f"{name}: space = 'flow' needs a flow-matching model (alpha = 1 − sigma); "
            "use space = 'auto' for this one."
        )


def slope(pred: Prediction, span: Span, space: Space = "auto") -> Lin:
    """F at the prediction."""
    kind = space_of(span, space)
    return pred.velocity if kind == "flow" else pred.eps if kind == "eps" else pred.x0


def euler(pred: Prediction, span: Span) -> Lin:
    """x' for the slope F itself: the DDIM step, Euler's on a flow model."""
    if pred.kind == "velocity" and pred.direction is None and span.is_flow:
        # the same value without two large terms of opposite sign, as diffusers computes it
        return pred.x + (span.next.sigma - span.now.sigma) * pred.out
    return span.next.alpha * pred.x0 + span.next.sigma * pred.eps


def gain(span: Span, space: Space = "auto") -> Any:
    """dx'/de. Raises ValueError where the coordinate is undefined at `span.now`."""
    (_, a, s), (_, a_next, s_next) = span.now, span.next
    kind = space_of(span, space)
    if kind == "flow":
        return s_next - s
    if kind == "eps":
        _require_signal(span)
        return s_next - a_next * s / a
    return a_next - s_next * a / s


def carried(span: Span, space: Space = "auto") -> Any:
    """dx'/dx at a fixed slope. Raises ValueError as `gain` does."""
    kind = space_of(span, space)
    if kind == "flow":
        return 1.0
    if kind == "data":
        return span.next.sigma / span.now.sigma
    _require_signal(span)
    return span.next.alpha / span.now.alpha


def advance(pred: Prediction, span: Span, e: Lin, space: Space = "auto") -> Lin:
    """x' for the slope e.

    With a direction of its own (CFG++), x = alpha·x0 + sigma·eps does not hold; then e − F is added
    to the Euler step of the two.
    """
    if pred.direction is not None:
        return euler(pred, span) + gain(span, space) * (e - slope(pred, span, space))
    return carried(span, space) * pred.x + gain(span, space) * e


def clock(level: Level, space: Coordinate) -> Any:
    """u of a level: infinite at alpha = 0 in "eps" and at sigma = 0 in "data"."""
    if space == "flow":
        return level.sigma
    if space == "eps":
        return _ratio(level.sigma, level.alpha)
    return _ratio(level.alpha, level.sigma)


def log_snr(level: Level) -> Any:
    """lambda = log(alpha/sigma): −inf at alpha = 0, inf at sigma = 0."""
    ratio = _ratio(level.alpha, level.sigma)
    if not isinstance(ratio, float):
        return ratio.log()
    return math.log(ratio) if ratio > 0 else -math.inf


def damped(beta: Any, velocity: Any, e: Lin) -> Lin:
    """(1 − beta)·velocity + beta·e; e itself without a velocity (None) and at beta = 1."""
    if velocity is None or (isinstance(beta, float) and beta == 1):
        return e
    return (1 - beta) * Lin.of(velocity) + beta * e


def weighted(coefficients: Sequence[Any], history: Sequence[Any]) -> Lin:
    """sum_j coefficients[j]·history[j], newest first; coefficients floats or [B]."""
    total = coefficients[0] * Lin.of(history[0])
    for coefficient, value in zip(coefficients[1:], history[1:], strict=True):
        total = total + coefficient * Lin.of(value)
    return total


def _require_signal(span: Span) -> None:
    if isinstance(span.now.alpha, float) and span.now.alpha == 0:
        raise ValueError("At alpha = 0 only the Euler step exists: no history can be used.")


def _ratio(top: Any, bottom: Any) -> Any:
    if isinstance(bottom, float) and bottom == 0:
        return math.inf
    return top / bottom
