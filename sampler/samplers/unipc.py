"""UniPC of order 2: a predictor, corrected by the evaluation of the next step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from sampler.registry import register
from sampler.samplers.coordinates import carried, damped, gain, log_snr
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span

Compat = Literal["clean", "published"]


class UniPCState(NamedTuple):
    """Input of the corrector: start of the last step, and how the step was made.

    x: corrected x [B, ...] at `level`; x0: predicted there; older: x0 predicted one step before,
    None at the start; h, h_older: steps in lambda from `level` on and before it; order: of the
    predictor; velocity: of heavy ball, or None.
    """

    x: Any
    level: Level
    x0: Any
    older: Any
    h: Any
    h_older: Any
    order: int
    velocity: Any


@register("sampler", "unipc")
@dataclass(frozen=True)
class UniPC(SamplerBase):
    """UniPC of order 2 (bh2, data prediction): a predictor, corrected by the next evaluation.

        predictor  d = m_0 + (m_0 − m_{−1})·h/(2·h_before),   the step that of `dpmpp_2m`
        corrector  d = m_0 + rho_0·q·(m_{−1} − m_0) + rho_1·(m − m_0),   q = −h/h_before

    h as for `dpmpp_2m`; m_0 is x0 where the step began, m_{−1} the one before, m the one evaluated
    at its result, with which the step is repeated. rho solves

        rho_0 + rho_1 = b_1,   rho_0/q + rho_1 = b_2,   b_k = k!·phi_{k+1}/phi_1
        phi_1 = e^{−h} − 1,   phi_{k+1} = phi_k/(−h) − 1/k!

    One evaluation per step: the corrector uses that of the next one. The first step and the last
    are first-order predictions, and the corrector after a first-order step is m_0 + (m − m_0)/2.
    """

    reference: ClassVar[str] = "UniPC (Zhao et al., 2023), arXiv:2302.04867, Algorithm 5, 6"

    @property
    def convergence(self) -> float:
        return 2.0

    def step(self, x: Any, pred: Prediction, span: Span, state: UniPCState | tuple[()]) -> Move:
        return unipc(pred, span, state)


def unipc(
    pred: Prediction,
    span: Span,
    state: UniPCState | tuple[()],
    beta: float = 1.0,
    compat: Compat = "clean",
) -> Move:
    """Corrects x with the new x0, then predicts; beta < 1 averages the corrector's slope."""
    m, h = pred.x0, log_snr(span.next) - log_snr(span.now)
    x, velocity, older, h_older = pred.x, None, None, 0.0
    if state:
        x, velocity = _corrected(m, span.now, state, beta, compat)
        older, h_older = state.x0, state.h
    ends = isinstance(span.next.sigma, float) and span.next.sigma == 0
    order = 1 if not state or ends or span.is_last else 2
    d = m if order == 1 else m + (m - Lin.of(older)) * (h / h_older / 2)
    mean = carried(span, "data") * x + gain(span, "data") * d
    kept = velocity if beta != 1 else None
    return Move(mean, 0.0, UniPCState(x, span.now, m, older, h, h_older, order, kept))


def _corrected(
    m: Lin, now: Level, state: UniPCState, beta: float, compat: Compat
) -> tuple[Lin, Lin]:
    """(x, velocity) at `now`: the last step repeated with the x0 that was predicted at `now`."""
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
    """(b_1, b_2) of UniPC's data prediction, B(h) = phi_1 = e^{−h} − 1."""
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    return phi_2 / phi_1, 2 * phi_3 / phi_1
