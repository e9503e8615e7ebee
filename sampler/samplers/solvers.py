"""DPM-Solver++(2M) and UniPC as samplers; the equations are in `data_space.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.registry import register
from sampler.samplers.data_space import dpmpp_2m, unipc
from sampler.types import Move, Prediction, SamplerBase, Span


@register("sampler", "dpmpp_2m")
@dataclass(frozen=True)
class DPMSolverPP2M(SamplerBase):
    """DPM-Solver++(2M), midpoint: second order in log-SNR on the predicted x0.

        d = m + (m − m_before)·h/(2·h_before);   x' = (sigma'/sigma)·x − alpha'·(e^{−h} − 1)·d

    h is the step in lambda = log(alpha/sigma), m = x0. The first step is first order (DDIM), and
    so is the last where it ends at sigma' = 0, or in runs of fewer than 15 steps.
    """

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, Algorithm 2"

    @property
    def convergence(self) -> float:
        return 2.0

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        return dpmpp_2m(pred, span, state, beta=1.0)


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

    One evaluation per step: the corrector uses that of the next one. The last step is a first-order
    prediction.
    """

    reference: ClassVar[str] = "UniPC (Zhao et al., 2023), arXiv:2302.04867, Algorithm 5, 6"

    @property
    def convergence(self) -> float:
        return 2.0

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        return unipc(pred, span, state, beta=1.0, compat="clean")
