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
from itertools import pairwise
from typing import Any, Literal, Protocol

from sampler.samplers.coordinates import euler, is_flow, log_snr
from sampler.samplers.multistep_weights import places, weights
from sampler.samplers.shares import NoiseKind, effective, interval, refuse_rows
from sampler.types import Level, Lin, Move, Prediction, Span

Clock = Literal["auto", "snr", "sigma"]
History = tuple[tuple[float, Any], ...]  # (u, D), newest first
Rule = Callable[[tuple[float, ...], float], Sequence[float]]  # (places, H) to weights


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
    rule: Rule,
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
    spans: Sequence[Span],
    order: int,
    rule: Rule = weights,
    k: Any = 1.0,
    clock: Clock = "snr",
    taken: int | None = None,
) -> tuple[float, ...]:
    """Weights of the targets D in the error of the last of these steps (`error_weights`).

        (alpha' − c·alpha)·(e_{p+1} − e_p),   p = order

    e_{p+1} is averaged with the exact kernel; e_p is that of the step, made with `rule` from
    `taken` values (default p).
    """
    span = spans[-1]
    u = clock_of(span, clock)
    found = nodes(spans, order + 1, u)
    if not found:
        return ()
    (_, a, s), (_, a_next, s_next) = span.now, span.next
    H = effective(u(span.next) - u(span.now), k)
    gain = a_next - k * s_next * a / s
    return to_next_order(spans, found, u, rule, H, gain, order if taken is None else taken)


def nodes(spans: Sequence[Span], count: int, u: Callable[[Level], float]) -> list[int]:
    """Places of the last `count` steps that are nodes of a polynomial in u, newest (0) first.

    Empty where there are fewer, and where the last step has no higher order: it ends at sigma' = 0
    or repeats its level. A level without u (alpha = 0) and those before it are no nodes.
    """
    last = spans[-1]
    if last.next.sigma == 0 or _repeats(last):
        return []
    found: list[int] = []
    for place, span in enumerate(reversed(spans)):
        if len(found) == count or not math.isfinite(u(span.now)):
            break
        if not _repeats(span):
            found.append(place)
    return found if len(found) == count else []


def to_next_order(
    spans: Sequence[Span],
    found: Sequence[int],
    u: Callable[[Level], float],
    rule: Rule,
    H: float,
    gain: float,
    taken: int,
) -> tuple[float, ...]:
    """gain·(w of all nodes found − w of the first `taken`), by place; w_0 is that of the rest."""
    last = spans[-1]
    known = places([u(spans[-1 - place].now) for place in found], u(last.next))
    own = (*rule(known[:taken], H), *(0.0,) * len(known))
    by_place = [0.0] * (found[-1] + 1)
    for place, after, before in zip(found[1:], weights(known, H)[1:], own[1:], strict=False):
        by_place[place] = gain * (after - before)
    return tuple(by_place)


def _repeats(span: Span) -> bool:
    return span.now.sigma * span.next.alpha == span.next.sigma * span.now.alpha


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
