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

    The predictor is DPM-Solver++(2M)'s step; when x0 has been evaluated at its result, the step is
    repeated with that value in the sum (`data_space.py`). One evaluation per step. The last step
    is a first-order prediction.
    """

    reference: ClassVar[str] = "UniPC (Zhao et al., 2023), arXiv:2302.04867, Algorithm 5, 6"

    @property
    def convergence(self) -> float:
        return 2.0

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        return unipc(pred, span, state, beta=1.0, compat="clean")
