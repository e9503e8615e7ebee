"""RES: the multistep method on x0 with the weights of the exact exponential integral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from sampler.registry import register
from sampler.registry.constraints import Nonnegative
from sampler.samplers.coordinates import is_flow
from sampler.samplers.dpmpp import DataMultistep, Eta, warn_short_run
from sampler.samplers.exponential import Clock
from sampler.samplers.shares import NoiseKind
from sampler.types import Move, Prediction, Span

Order = Annotated[int, Ge(1), Le(3)]
# Below this number of steps the bundled model misses prompts that it meets with others
# (docs/samplers.md, quality against evaluations).
MIN_STEPS = 8


@register("sampler", "res_multistep")
@dataclass(frozen=True)
class RESMultistep(DataMultistep):
    """RES: the exact exponential integral of a polynomial through the last predictions of x0.

        e = sum_j w_j·m_j,   sum_j w_j·s_j^i = M_i(H),   i = 0 .. order − 1

    s_j and M as for `dpmpp_3m_sde`: of order 2 it is `dpmpp_2m` with `solver_type: heun`. The step
    is that of `dpmpp_2m_sde`.

    order: 1 (DDIM) to 3; 2 by default.
    eta: amount of noise, at least 0; 0 (default) is deterministic, 1 is res_multistep_ancestral.
    s_noise, noise: as for `dpmpp_2m_sde`.
    clock: "auto" (default), −ln sigma on flow models and lambda elsewhere; or "snr", "sigma" for
        one of them. With eta above 0 it is always lambda.
    """

    order: Order = 2
    eta: Eta = 0.0
    s_noise: Nonnegative = 1.0
    clock: Clock = "auto"
    noise: NoiseKind = "step"

    reference: ClassVar[str] = (
        "Refined Exponential Solver (Zhang et al., 2023), arXiv:2308.02157; ComfyUI's res_multistep"
    )

    @property
    def convergence(self) -> float | None:
        return None if self.stochastic else float(min(self.order, 2))

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if is_flow(span) and self.order > 1:
            warn_short_run(MIN_STEPS, "res_multistep overshoots on flow models", span, "unipc")
        return super().step(x, pred, span, state)
