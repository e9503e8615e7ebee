"""DPM++ SDE, DPM++ 2S and RES 2S: methods of two stages, whose step is that of `stages.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Le

from sampler.registry import register
from sampler.registry.constraints import Fraction, Nonnegative
from sampler.samplers.coordinates import is_flow, log_snr
from sampler.samplers.exponential import carried, line, noisy
from sampler.samplers.multistep_weights import flat, weights
from sampler.samplers.shares import NoiseKind, Share, effective, refuse_rows, share
from sampler.samplers.stages import TwoStage, TwoStageState, ratio, undivided
from sampler.types import Move, Prediction, Span

Middle = Annotated[float, Gt(0), Le(1)]


@register("sampler", "res_2s")
@dataclass(frozen=True)
class RES2S(TwoStage):
    """RES 2S: the second-order exponential Runge-Kutta method on x0, with or without noise.

        e = w_0·D + w_1·D_m,   w_1 = M_1(H)/r   (phi_2),   1/(2r)   (phi_1),   w_0 = 1 − w_1
        k = e^{−eta·h},   H = (1 + eta)·h,   M_1 as for `dpmpp_3m_sde`

    The step is that of `stages.py`: D at its start, D_m at the level that lies at the share r of
    it in lambda = ln(alpha/sigma), both noises of one Brownian path. n steps cost 2n − 1
    evaluations.

    eta: amount of noise, at least 0; 0 (default) is deterministic. SEEDS-2 is eta 1 with phi_1.
    s_noise: factor on the noise; 1 keeps the level's amount.
    r: place of the middle level, above 0 to 1; 0.5 by default. With 1, the end of the step, it is
        the exponential Heun method (exp_heun_2_x0).
    solver_type: "phi_2" (default) or "phi_1", as above.
    noise: as for `ddim`.
    """

    eta: Nonnegative = 0.0
    s_noise: Nonnegative = 1.0
    r: Middle = 0.5
    solver_type: Literal["phi_1", "phi_2"] = "phi_2"
    noise: NoiseKind = "step"

    reference: ClassVar[str] = (
        "Refined Exponential Solver (Zhang et al., 2023), arXiv:2308.02157; SEEDS (Gonzalez et "
        "al., 2023), arXiv:2305.14267, Algorithm 1"
    )

    def place(self, span: Span) -> float:
        return self.r

    def combined(self, r: float, H: float) -> tuple[float, ...]:
        return (weights if self.solver_type == "phi_2" else flat)((0.0, r), H)


@register("sampler", "dpmpp_sde")
@dataclass(frozen=True)
class DPMSolverPPSDE(TwoStage):
    """DPM++ SDE: two stages on x0 with ancestral noise in both.

        e = (1 − 1/(2r))·D + D_m/(2r),   k² = 1 − eta²·(1 − (rho'/rho)²)

    The step is that of `res_2s`. Both noises are those of one Brownian path, as k-diffusion has
    them; codes that draw two independent ones lose contrast. At eta 1 it is `res_2s` with phi_1 and
    eta 1.

    eta: amount of noise, 0 to 1 (default). s_noise, r, noise: as for `res_2s`.
    """

    eta: Fraction = 1.0
    s_noise: Nonnegative = 1.0
    r: Middle = 0.5
    noise: NoiseKind = "step"

    policy: ClassVar[str] = "eta"
    reference: ClassVar[str] = (
        "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095; k-diffusion's sample_dpmpp_sde"
    )

    def place(self, span: Span) -> float:
        return self.r

    def combined(self, r: float, H: float) -> tuple[float, ...]:
        return flat((0.0, r), H)

    def _rest(self, span: Span, half: TwoStageState, k: float) -> Share:
        rho, middle, end = (ratio(v) for v in (half.level, span.now, span.next))
        lost = self.eta**2 * (middle - end) * (middle + end) / rho**2  # k_1² − k²
        return Share(k / half.k, math.sqrt(lost) / half.k)


@register("sampler", "dpmpp_2s")
@dataclass(frozen=True)
class DPMSolverPP2S(TwoStage):
    """DPM++ 2S: two stages on x0; with eta above 0 "DPM++ 2S a", with noise at the end only.

        x_m = (sigma_m/sigma)·x + (alpha_m − alpha·sigma_m/sigma)·D,   rho_m² = rho·rho_d
        x'  = c·x + (alpha' − c·alpha)·D_m + s_noise·sigma'·sqrt(1 − k²)·z,   c = k·sigma'/sigma

    k as for `euler_ancestral`, rho_d = k·rho' the level that is stepped down to: the middle lies
    half way to it. n steps cost 2n − 1 evaluations.

    eta: amount of noise, 0 (default, deterministic) to 1. s_noise, noise: as for `res_2s`.
    """

    eta: Fraction = 0.0
    s_noise: Nonnegative = 1.0
    noise: NoiseKind = "step"

    reference: ClassVar[str] = (
        "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, Algorithm 1; k-diffusion's "
        "sample_dpmpp_2s_ancestral"
    )

    def place(self, span: Span) -> float:
        h = log_snr(span.next) - log_snr(span.now)
        return effective(h, self._share(span).k) / h / 2

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        refuse_rows(span)
        if not state and not undivided(span):
            return Move(line(pred, span), 0.0, TwoStageState(pred.x, None, span.now, None, 1.0))
        whole = Span(span.index, state.level, span.next) if state else span
        k, fresh = self._share(whole)
        mean = carried(state.x, whole, pred.x0, k) if state else line(pred, span, k=k)
        return noisy(self, mean, whole, fresh, ())

    def _share(self, span: Span) -> Share:
        return share("flow" if is_flow(span) else "eta", span, self.eta)
