"""The coordinate in which a deterministic sampler sees the probability-flow ODE: dz/du = F.

    noise-space   z = x/alpha   u = sigma/alpha   F = eps         (variance preserving, exploding)
    flow          z = x         u = sigma         F = velocity    (alpha = 1 − sigma)

The first level of a flow or a zero-terminal-SNR grid has alpha = 0, where z and u of noise-space
have no value. So a step is written as the Euler step, which exists there, plus what the sampler's
slope e adds to it:

    x' = alpha'·x0 + sigma'·eps + c·(e − F),   c = sigma' − alpha'·sigma/alpha, or sigma' − sigma

and a first step, whose slope is F itself, never needs c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sampler.types import Lin, Prediction, Span


def is_flow(span: Span) -> bool:
    """Whether a step lies on flow matching's levels, alpha = 1 − sigma."""
    for level in (span.now, span.next):
        gap = abs(level.alpha + level.sigma - 1)
        if not (gap < 1e-6 if isinstance(gap, float) else bool((gap < 1e-6).all())):
            return False
    return True


def slope(pred: Prediction, span: Span) -> Lin:
    """F at the prediction: eps, or the velocity on a flow model."""
    return pred.velocity if is_flow(span) else pred.eps


def euler(pred: Prediction, span: Span) -> Lin:
    """x' for the slope F itself: the DDIM step, Euler's on a flow model."""
    return span.next.alpha * pred.x0 + span.next.sigma * pred.eps


def advance(pred: Prediction, span: Span, e: Lin) -> Lin:
    """x' for the slope e. Raises ValueError at alpha = 0 in noise-space: only F exists there."""
    now, after = span.now, span.next
    if is_flow(span):
        return euler(pred, span) + (after.sigma - now.sigma) * (e - pred.velocity)
    if isinstance(now.alpha, float) and now.alpha == 0:
        raise ValueError("At alpha = 0 only the Euler step exists (no history can be used there).")
    gain = after.sigma - after.alpha * now.sigma / now.alpha
    return euler(pred, span) + gain * (e - pred.eps)


def weighted(coefficients: Sequence[float], history: Sequence[Any]) -> Lin:
    """sum_j coefficients[j]·history[j], newest first; history of Lins or tensors [B, ...]."""
    total = coefficients[0] * Lin.of(history[0])
    for coefficient, value in zip(coefficients[1:], history[1:], strict=True):
        total = total + coefficient * Lin.of(value)
    return total
