"""The coordinate in which a deterministic sampler integrates the flow ODE: dz/du = F.

    eps     z = x/alpha   u = sigma/alpha   F = eps         (variance preserving, exploding)
    data    z = x/sigma   u = alpha/sigma   F = x0          (DPM-Solver++, UniPC)
    flow    z = x         u = sigma         F = velocity    (alpha = 1 − sigma)

A step with the sampler's slope e keeps z and moves along e,

    x' = carried·x + gain·e,   carried = dx'/dx, gain = dx'/de:

    eps     alpha'/alpha,   sigma' − alpha'·sigma/alpha
    data    sigma'/sigma,   alpha' − sigma'·alpha/sigma
    flow    1,              sigma' − sigma

The Euler step, e = F, is alpha'·x0 + sigma'·eps in all three and exists at every level: also at the
first of a zero-terminal-SNR grid (alpha = 0), where z and u of `eps` have no value, and at the last
(sigma' = 0), where those of `data` have none. A first step is Euler's, so it needs no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from sampler.types import Level, Lin, Prediction, Span

Space = Literal["auto", "eps", "data", "flow"]


def is_flow(span: Span) -> bool:
    """Return whether a step lies on flow matching's levels, alpha = 1 − sigma."""
    return _on_flow(span.now) and _on_flow(span.next)


def space_of(span: Span, space: Space = "auto") -> Space:
    """The coordinate of a step: `auto` is "flow" on flow matching's levels, else "eps"."""
    if space == "auto":
        return "flow" if is_flow(span) else "eps"
    return space


def check_space(name: str, space: Space, grid: Sequence[Level]) -> None:
    """Raises ValueError for space "flow" on a grid that is not flow matching's."""
    if space == "flow" and not all(_on_flow(level) for level in grid):
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
    if pred.kind == "velocity" and pred.direction is None and is_flow(span):
        # the same number without two large terms of opposite sign, as stock schedulers have it
        return pred.x + (span.next.sigma - span.now.sigma) * pred.out
    return span.next.alpha * pred.x0 + span.next.sigma * pred.eps


def gain(span: Span, space: Space = "auto") -> Any:
    """dx'/de. Raises ValueError where the coordinate has no value at `span.now`."""
    (_, a, s), (_, a_next, s_next) = span.now, span.next
    kind = space_of(span, space)
    if kind == "flow":
        return s_next - s
    if kind == "eps":
        _refuse_no_signal(span)
        return s_next - a_next * s / a
    return a_next - s_next * a / s


def carried(span: Span, space: Space = "auto") -> Any:
    """dx'/dx at a fixed slope. Raises ValueError as `gain` does."""
    kind = space_of(span, space)
    if kind == "flow":
        return 1.0
    if kind == "data":
        return span.next.sigma / span.now.sigma
    _refuse_no_signal(span)
    return span.next.alpha / span.now.alpha


def advance(pred: Prediction, span: Span, e: Lin, space: Space = "auto") -> Lin:
    """x' for the slope e.

    A rule that keeps target and direction apart (CFG++) breaks x = alpha·x0 + sigma·eps; then e
    enters as what it adds to the Euler step of the two.
    """
    space = space_of(span, space)
    if pred.direction is not None:
        return euler(pred, span) + gain(span, space) * (e - slope(pred, span, space))
    return carried(span, space) * pred.x + gain(span, space) * e


def clock(level: Level, space: str) -> Any:
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


def weighted(coefficients: Sequence[Any], history: Sequence[Any]) -> Lin:
    """sum_j coefficients[j]·history[j], newest first; coefficients floats or [B]."""
    total = coefficients[0] * Lin.of(history[0])
    for coefficient, value in zip(coefficients[1:], history[1:], strict=True):
        total = total + coefficient * Lin.of(value)
    return total


def _refuse_no_signal(span: Span) -> None:
    if isinstance(span.now.alpha, float) and span.now.alpha == 0.0:
        raise ValueError("At alpha = 0 only the Euler step exists: no history can be used.")


def _on_flow(level: Level) -> bool:
    gap = abs(level.alpha + level.sigma - 1)
    return gap < 1e-6 if isinstance(gap, float) else bool((gap < 1e-6).all())


def _ratio(top: Any, bottom: Any) -> Any:
    if isinstance(bottom, float) and bottom == 0.0:
        return math.inf
    return top / bottom
