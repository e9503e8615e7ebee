"""DPM-Solver++(2M): second order in log-SNR on the predicted x0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from sampler.registry import register
from sampler.samplers.coordinates import advance, damped, euler, log_snr
from sampler.types import Lin, Move, Prediction, SamplerBase, Span

SHORT_RUN = 15  # runs of fewer steps end with a first-order step, as published and in diffusers


class DPMState(NamedTuple):
    """Last x0, the step h in lambda that followed it, and the velocity of heavy ball, or None."""

    x0: Any
    h: Any
    velocity: Any


@register("sampler", "dpmpp_2m")
@dataclass(frozen=True)
class DPMSolverPP2M(SamplerBase):
    """DPM-Solver++(2M), midpoint: second order in log-SNR on the predicted x0.

        d = m + (m − m_before)·h/(2·h_before);   x' = (sigma'/sigma)·x − alpha'·(e^{−h} − 1)·d

    h is the step in lambda = log(alpha/sigma), m = x0. The first step is first order (DDIM), and
    so is the last where it ends at sigma' = 0, or in runs of fewer than 15 steps.
    """

    reference: ClassVar[str] = "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, Algorithm 2"

    @property
    def convergence(self) -> float:
        return 2.0

    def step(self, x: Any, pred: Prediction, span: Span, state: DPMState | tuple[()]) -> Move:
        return dpmpp_2m(pred, span, state)


def dpmpp_2m(pred: Prediction, span: Span, state: DPMState | tuple[()], beta: float = 1.0) -> Move:
    """The step; beta < 1 averages d over the steps: v = (1 − beta)·v_before + beta·d.

    First-order steps neither use nor change v.
    """
    m, h = pred.x0, log_snr(span.next) - log_snr(span.now)
    velocity = state.velocity if state else None
    if not state or _ends(span.next.sigma) or (span.is_last and span.total < SHORT_RUN):
        return Move(euler(pred, span), 0.0, DPMState(m, h, velocity))
    d = m + (m - Lin.of(state.x0)) * (h / state.h / 2)
    v = damped(beta, velocity, d)
    return Move(advance(pred, span, v, "data"), 0.0, DPMState(m, h, v if beta != 1 else None))


def _ends(sigma: Any) -> bool:
    return isinstance(sigma, float) and sigma == 0
