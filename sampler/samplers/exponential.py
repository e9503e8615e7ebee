"""Exponential integrators with noise: the step that all of these samplers share.

    x' = c·x + (alpha' − c·alpha)·e + s_noise·sigma'·sqrt(1 − k²)·z,   c = k·sigma'/sigma
    e = sum_j w_j·D_j,   sum_j w_j = 1,   D_j = x0 as predicted now and before,   z ~ N(0, I)

k, the share of the next level's noise that is the predicted one, is the noise policy (`shares.py`);
the weights w are the multistep method (`multistep_weights.py`). In x/alpha a step multiplies x by
e^{−H}, H = h − ln k, h = ln(rho/rho'), rho = sigma/alpha. Everything is float64 on the host: the
coefficients of a step are constants of its span.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, Protocol

from sampler.samplers.coordinates import euler, is_flow, log_snr
from sampler.samplers.multistep_weights import places, weights
from sampler.samplers.shares import NoiseKind, effective, interval, refuse_rows
from sampler.types import Level, Lin, Move, Prediction, Span

Clock = Literal["auto", "snr", "sigma"]
History = tuple[tuple[float, Any], ...]  # (u, D), newest first


class Noisy(Protocol):
    """Settings of the noise of a sampler."""

    @property
    def s_noise(self) -> float: ...
    @property
    def noise(self) -> NoiseKind: ...


def clock_of(span: Span, clock: Clock) -> Callable[[Level], float]:
    """Return u of a level: ln(alpha/sigma), or −ln(sigma) on flow levels with clock "sigma".

    "auto" is "sigma" on flow, else "snr"; on the levels of other processes the two are the same.
    """
    if clock == "snr" or not is_flow(span):
        return log_snr
    return lambda level: -math.log(level.sigma) if level.sigma > 0 else math.inf


def line(pred: Prediction, span: Span, e: Lin | None = None, k: Any = 1.0) -> Lin:
    """Mean of x' for the combined target e, x0 itself where it is None.

    A direction kept apart from the target (CFG++) enters as alpha'·D + k·sigma'·eps +
    (alpha' − c·alpha)·(e − D), which is the same number where there is none.
    """
    (_, a, s), (_, a_next, s_next) = span.now, span.next
    if isinstance(s_next, float) and s_next == 0.0:
        return a_next * pred.x0
    kept = k * s_next
    if e is not None and pred.direction is None:
        return carried(pred.x, span, e, k)
    whole = isinstance(k, float) and k == 1.0
    first = euler(pred, span) if whole else a_next * pred.x0 + kept * pred.eps
    return first if e is None else first + (a_next - kept * a / s) * (e - pred.x0)


def noisy(settings: Noisy, mean: Lin, span: Span, fresh: Any, state: Any) -> Move:
    """The move with noise of std s_noise·sigma'·fresh, fresh = sqrt(1 − k²)."""
    std = settings.s_noise * span.next.sigma * fresh
    return Move(mean, std, state, interval(span, settings.noise))


def carried(x: Any, span: Span, e: Lin, k: Any = 1.0) -> Lin:
    """c·x + (alpha' − c·alpha)·e for x [B, ...] at `span.now`."""
    (_, a, s), (_, a_next, s_next) = span.now, span.next
    kept = k * s_next
    return kept / s * Lin.of(x) + (a_next - kept * a / s) * e


def combined(w: Sequence[float], values: Sequence[Any]) -> Lin:
    """sum_j w_j·D_j as D_0 + sum w_j·(D_j − D_0): differences are formed first."""
    newest = Lin.of(values[0])
    total = newest
    for weight, value in zip(w[1:], values[1:], strict=True):
        total = total + weight * (Lin.of(value) - newest)
    return total


def extrapolated(
    pred: Prediction,
    span: Span,
    history: History,
    order: int,
    rule: Callable[[tuple[float, ...], float], Sequence[float]],
    k: float = 1.0,
    clock: Clock = "snr",
) -> tuple[Lin | None, History]:
    """(e, new history) of a multistep step with up to `order` values; e is None at order 1.

    rule(places, H) gives the weights. A level without a clock (alpha = 0) is not a node: the
    history begins after it.
    """
    refuse_rows(span)
    u = clock_of(span, clock)
    now, end = u(span.now), u(span.next)
    if not math.isfinite(now):
        return None, ()
    known = ((now, pred.x0), *history)[:order]
    if len(known) == 1 or not math.isfinite(end):
        return None, known[: order - 1]
    w = rule(places([u for u, _ in known], end), effective(end - now, k))
    return combined(w, [value for _, value in known]), known[: order - 1]


def next_order(
    move: Move,
    pred: Prediction,
    span: Span,
    history: History,
    order: int,
    k: Any = 1.0,
    clock: Clock = "snr",
) -> tuple[Move, Lin | None]:
    """(move with one more value in its history, mean of order + 1 with the exact kernel − mean).

        (alpha' − c·alpha)·(e_{p+1} − e_p)

    for a move of `order` p made with `history`. The second is None without p + 1 values, and where
    the step ends at sigma' = 0, which is D in every order.
    """
    if span.now.sigma * span.next.alpha == span.next.sigma * span.now.alpha:
        return replace(move, state=history), None  # a repeated level is no node
    e, kept = extrapolated(pred, span, history, order + 1, weights, k, clock)
    move = replace(move, state=kept)
    if e is None or len(history) < order or span.next.sigma == 0:
        return move, None
    return move, line(pred, span, e, k) - Lin.of(move.mean)


def falling(name: str, grid: tuple[Level, ...]) -> tuple[Level, ...]:
    """Return the grid itself. Raises ValueError for a level that is not below the one before."""
    for before, after in pairwise(grid):
        values = (before.alpha, before.sigma, after.alpha, after.sigma)
        if not all(isinstance(v, (int, float)) for v in values):
            continue
        if after.sigma * before.alpha >= before.sigma * after.alpha:
            raise ValueError(
                f"{name}: the level t = {after.t:g} (sigma/alpha {_ratio(after):.6g}) must lie "
                f"below the one before, t = {before.t:g} ({_ratio(before):.6g}); use a grid that "
                "falls at every step."
            )
    return grid


def _ratio(level: Level) -> float:
    return level.sigma / level.alpha if level.alpha else math.inf
