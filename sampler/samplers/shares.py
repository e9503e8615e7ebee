"""Noise policies: k, the share of the next level's noise that is the predicted one.

With rho = sigma/alpha, q = rho'/rho and h = −ln q:

    none    1
    eta     sqrt(1 − eta²·(1 − q²))                  DDIM, DDPM, Euler ancestral
    sde     q^eta                                    SDE-DPM-Solver++, SEEDS, SA-Solver
    er      ((e^{rho'^0.3} + 10)/(e^{rho^0.3} + 10))^eta           ER-SDE
    flow    rho_d/rho',  sigma_d = sigma'·(1 + eta·(sigma'/sigma − 1))    Euler ancestral on flow

Everything is float64 on the host: the coefficients of a step are constants of its span.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from sampler_kernels import sqrt

from sampler.samplers.coordinates import log_snr
from sampler.types import Span

# Noise of a step alone, or the increment of one Brownian path in lambda = ln(alpha/sigma).
NoiseKind = Literal["step", "path"]


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


def interval(span: Span, noise: NoiseKind) -> tuple[float, float] | None:
    """(lambda, lambda') of a step whose noise is part of a path, None for noise of its own."""
    if noise == "step":
        return None
    refuse_rows(span)
    return log_snr(span.now), log_snr(span.next)


def effective(h: float, k: float) -> float:
    """H = h − ln k."""
    return h - math.log(k) if k > 0 else math.inf


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
