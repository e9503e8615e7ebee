"""DPM-Solver++(2M) and UniPC as moves in data-space, each with heavy-ball momentum on its slope.

    lambda = log(alpha/sigma),   h = lambda' − lambda,   m = x0 as predicted
    x' = (sigma'/sigma)·x + (alpha' − sigma'·alpha/sigma)·v,   v = (1 − beta)·v_before + beta·d

alpha' − sigma'·alpha/sigma is −alpha'·(e^{−h} − 1). beta = 1 is the plain solver.

First and last steps: the first is first order. So is the last where it ends at sigma' = 0 (h is
infinite there); elsewhere it is for UniPC always, and for DPM-Solver++ in runs of fewer than 15
steps: the published and stock rules. First-order steps of DPM-Solver++ neither use nor change v.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from sampler.samplers.coordinates import advance, carried, euler, gain, log_snr
from sampler.samplers.momentum import damped
from sampler.types import Level, Lin, Move, Prediction, Span

Compat = Literal["clean", "published"]

# Stock and published DPM-Solver++ end with a first-order step in runs shorter than this.
SHORT_RUN = 15


class Last(NamedTuple):
    """The last x0, the step in lambda that followed it, and the velocity if there is one."""

    x0: Any
    h: float
    velocity: Any


def dpmpp_2m(pred: Prediction, span: Span, state: Any, beta: float) -> Move:
    """d = m + (m − m_before)·h/(2·h_before)."""
    m, h = pred.x0, log_snr(span.next) - log_snr(span.now)
    velocity = state.velocity if state else None
    if not state or _ends_low(span, SHORT_RUN):
        return Move(euler(pred, span), 0.0, Last(m, h, velocity))
    d = m + (m - Lin.of(state.x0)) * (h / state.h / 2)
    v = damped(beta, velocity, d)
    return Move(advance(pred, span, v, "data"), 0.0, Last(m, h, v if beta != 1 else None))


class Corrector(NamedTuple):
    """Values of the step before that the corrector needs: where it began, and how it was made."""

    x: Any  # corrected x [B, ...] at `level`
    level: Level
    x0: Any  # x0 predicted there
    older: Any  # x0 predicted one step before, None at the start
    h: float  # lambda step from `level` on
    h_older: float
    order: int
    velocity: Any


def unipc(pred: Prediction, span: Span, state: Any, beta: float, compat: Compat) -> Move:
    """Corrects x with the new x0, then predicts: order 2 in both, B(h) = e^{−h} − 1 ("bh2")."""
    m, h = pred.x0, log_snr(span.next) - log_snr(span.now)
    x, velocity = pred.x, None
    if state:
        x, velocity = _corrected(m, span.now, state, beta, compat)
    low = not state or _ends_low(span, math.inf)
    d = m if low else m + (m - Lin.of(state.x0)) * (h / state.h / 2)
    mean = carried(span, "data") * x + gain(span, "data") * d
    older, h_older = (state.x0, state.h) if state else (None, 0.0)
    order = 1 if low else 2
    kept = velocity if beta != 1 else None
    return Move(mean, 0.0, Corrector(x, span.now, m, older, h, h_older, order, kept))


def _corrected(
    m: Lin, now: Level, state: Corrector, beta: float, compat: Compat
) -> tuple[Lin, Lin]:
    """(x, velocity) at `now` from the x before, with the x0 that was predicted at `now`.

    d = m_0 + rho_0·(m_{−1} − m_0)·q + rho_1·(m − m_0),   q = −h/h_before

    rho solves rho_0 + rho_1 = b_1, rho_0/q + rho_1 = b_2 with b_k = k!·phi_{k+1}/B, phi_1 = B,
    phi_{k+1} = phi_k/(−h) − 1/k!. First order: d = m_0 + (m − m_0)/2.
    """
    m_0 = Lin.of(state.x0)
    if state.order == 1:
        d = m_0 + 0.5 * (m - m_0)
    else:
        b_1, b_2 = _phi_ratios(state.h)
        q = -state.h / state.h_older
        rho_0 = (b_2 - b_1) * q / (1 - q)
        d = m_0 + rho_0 * q * (Lin.of(state.older) - m_0) + (b_1 - rho_0) * (m - m_0)
    velocity = state.velocity
    if velocity is not None and compat == "published":
        velocity = (now.sigma / state.level.sigma) * Lin.of(velocity)
    v = damped(beta, velocity, d)
    before = Span(0, state.level, now)
    return carried(before, "data") * Lin.of(state.x) + gain(before, "data") * v, v


def _phi_ratios(h: float) -> tuple[float, float]:
    """b_1, b_2 of UniPC's data prediction, B(h) = phi_1 = e^{−h} − 1."""
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    return phi_2 / phi_1, 2 * phi_3 / phi_1


def _ends_low(span: Span, short: float) -> bool:
    if isinstance(span.next.sigma, float) and span.next.sigma == 0:
        return True
    return span.index == span.total - 1 and span.total < short
