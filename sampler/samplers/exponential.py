"""Exponential integrators with noise: the one step that all of these samplers are.

    x' = c·x + (alpha' − c·alpha)·e + s_noise·sigma'·sqrt(1 − k²)·z,   c = k·sigma'/sigma
    e = sum_j w_j·D_j,   sum_j w_j = 1,   D_j = x0 as predicted now and before,   z ~ N(0, I)

k, the share of the next level's noise that is the predicted one, is the noise policy; the weights
w are the multistep method. With rho = sigma/alpha, q = rho'/rho and h = −ln q:

    none    1
    eta     sqrt(1 − eta²·(1 − q²))                  DDIM, DDPM, Euler ancestral
    sde     q^eta                                    SDE-DPM-Solver++, SEEDS, SA-Solver
    er      ((e^{rho'^0.3} + 10)/(e^{rho^0.3} + 10))^eta           ER-SDE
    flow    rho_d/rho',  sigma_d = sigma'·(1 + eta·(sigma'/sigma − 1))    Euler ancestral on flow

In x/alpha a step multiplies x by e^{−H}, H = h − ln k. Everything is float64 on the host: the
coefficients of a step are constants of its span.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from sampler_kernels import sqrt

from sampler.samplers.coordinates import euler, is_flow, log_snr
from sampler.types import Level, Lin, Move, Prediction, Span

Clock = Literal["auto", "snr", "sigma"]
History = tuple[tuple[float, Any], ...]  # (u, D), newest first


class Share(NamedTuple):
    """k, and sqrt(1 − k²), which is not formed from a rounded k."""

    k: Any
    fresh: Any


KEPT = Share(1.0, 0.0)  # deterministic steps


def _eta(span: Span, eta: float) -> Share:
    q = _remaining(span)
    return Share(sqrt((1 - eta) * (1 + eta) + (eta * q) * (eta * q)), eta * sqrt((1 - q) * (1 + q)))


def _sde(span: Span, eta: float) -> Share:
    q = _remaining(span)
    return Share(0.0, 1.0) if q == 0 else _of_log(eta * math.log(q))


def _er(span: Span, eta: float) -> Share:
    (_, a, s), (_, a_next, s_next) = span.now, span.next
    if a == 0:
        return Share(0.0, 1.0)
    return _of_log(eta * (log_er(s_next / a_next) - log_er(s / a)))


def _flow(span: Span, eta: float) -> Share:
    s, after = span.now.sigma, span.next
    left = 1 - after.sigma * (1 + eta * (after.sigma / s - 1))  # 1 − sigma_d
    missing = eta * (1 - after.sigma / s) / left  # 1 − k
    return Share(1 - missing, sqrt(missing * (2 - missing)))


_POLICIES: Mapping[str, Callable[[Span, float], Share]] = {
    "eta": _eta,
    "sde": _sde,
    "er": _er,
    "flow": _flow,
}


def share(policy: str, span: Span, eta: float) -> Share:
    """Return k of a step and sqrt(1 − k²) for a policy of the table above; eta = 0 is "none".

    Raises ValueError for samples at different levels under "sde" and "er".
    """
    if eta == 0:
        return KEPT
    if policy in ("sde", "er"):
        refuse_rows(span)
    return _POLICIES[policy](span, eta)


def log_er(rho: float) -> float:
    """ln(e^{rho^0.3} + 10) of ER-SDE's default noise function, for any rho."""
    power = rho**0.3
    return power + math.log1p(10 * math.exp(-power))


def moments(H: float, count: int) -> list[float]:
    """M_m = ∫ e^{Hs}·s^m ds / ∫ e^{Hs} ds over 0..1, m = 0 .. count − 1; 1/(m + 1) at H = 0.

    By the recursion I_m = 1 − (m/H)·I_{m−1}, M_m = I_m/I_0; by quadrature where |H| < 2, as the
    recursion cancels there.
    """
    if H == 0:
        return [1 / (m + 1) for m in range(count)]
    if abs(H) < 2:
        nodes, mass = gauss(16)
        kernel = [w * math.exp(H * s) for s, w in zip(nodes, mass, strict=True)]
        whole = math.fsum(kernel)
        return [
            math.fsum(k * s**m for k, s in zip(kernel, nodes, strict=True)) / whole
            for m in range(count)
        ]
    # for H < 0 all I are multiplied by e^H, so that none overflows
    top = 1.0 if H > 0 else math.exp(H)
    found = [-math.expm1(-H) if H > 0 else math.expm1(H)]
    for m in range(1, count):
        found.append(top - m / H * found[-1])
    return [value / found[0] for value in found]


@cache
def gauss(count: int) -> tuple[list[float], list[float]]:
    """Nodes in 0..1 and weights, of sum 1, of Gauss-Legendre quadrature."""
    import numpy as np

    nodes, mass = np.polynomial.legendre.leggauss(count)
    return ((nodes + 1) / 2).tolist(), (mass / 2).tolist()


def solved(places: Sequence[float], values: Sequence[float]) -> tuple[float, ...]:
    """Solve sum_j w_j·s_j^m = values[m] for the weights w of nodes at `places`.

    Raises ValueError for nodes that coincide.
    """
    if len(set(places)) < len(places):
        raise ValueError(f"The nodes {list(places)} of a multistep formula must be distinct.")
    import numpy as np

    matrix = np.asarray(places)[None, :] ** np.arange(len(places))[:, None]
    return tuple(np.linalg.solve(matrix, np.asarray(values[: len(places)])).tolist())


def weights(places: Sequence[float], H: float) -> tuple[float, ...]:
    """Weights of values at `places` of a step 0..1: interpolate, average with the kernel e^{Hs}.

    H = 0 is Adams-Bashforth for unequal steps. They sum to 1; places must be distinct.
    """
    return solved(places, moments(H, len(places)))


def flat(places: Sequence[float], H: float) -> tuple[float, ...]:
    """Weights without the kernel: Adams-Bashforth in the clock."""
    return weights(places, 0.0)


def simple(places: Sequence[float], H: float) -> tuple[float, ...]:
    """Weights of two values, at 0 and at s: w_s = (H/2)/(1 − e^{−H})/s; exact ones otherwise."""
    if len(places) != 2 or not math.isfinite(H):
        return weights(places, H)
    w = H / 2 / -math.expm1(-H)
    return tuple(w / s if s else 1 - w / sum(places) for s in places)


def effective(h: float, k: float) -> float:
    """H = h − ln k."""
    return h - math.log(k) if k > 0 else math.inf


def places(clocks: Sequence[float], end: float) -> tuple[float, ...]:
    """Map clocks to the step from clocks[0] to `end` as 0..1; earlier ones are negative."""
    return tuple((u - clocks[0]) / (end - clocks[0]) for u in clocks)


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
    rule: Callable[[Sequence[float], float], Sequence[float]],
    k: float = 1.0,
    clock: Clock = "snr",
) -> tuple[Lin | None, History]:
    """(e, new history) of a multistep step with up to `order` values; e is None at order 1.

    rule(places, H) gives the weights. A level without a clock (alpha = 0) is no node: the history
    begins after it.
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


def refuse_rows(span: Span) -> None:
    """Raise ValueError for samples at different levels, which a history cannot have."""
    if not isinstance(span.now.sigma, (int, float)):
        raise ValueError(
            "A multistep method needs all samples at one level; use ddim or euler_ancestral for "
            "samples at different levels."
        )


def _remaining(span: Span) -> Any:
    """q = rho'/rho, 0 at alpha = 0."""
    return span.now.alpha * span.next.sigma / (span.next.alpha * span.now.sigma)


def _of_log(log_k: float) -> Share:
    return Share(math.exp(log_k), math.sqrt(-math.expm1(2 * log_k)))


def _ratio(level: Level) -> float:
    return level.sigma / level.alpha if level.alpha else math.inf
