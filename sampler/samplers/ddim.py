"""DDIM, and ancestral sampling as its stochastic limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import DocInfo, Ge, Le
from sampler_kernels import sqrt

from sampler.registry import register
from sampler.samplers.coordinates import euler
from sampler.samplers.exponential import next_order
from sampler.samplers.shares import NoiseKind, interval, share
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


@register("sampler", "ddim")
@dataclass(frozen=True)
class DDIM(SamplerBase):
    """Denoising diffusion implicit model: a step to the predicted x0, renoised to the next level.

        x' = alpha'·x0 + sigma'·(sqrt(1 − tau)·eps + sqrt(tau)·z)
        tau = eta²·(1 − (alpha·sigma' / (alpha'·sigma))²),   z ~ N(0, I)

    sigma'²·tau is eta² times the variance of the posterior q(x'|x, x0). On flow models
    (alpha = 1 − sigma) the step with eta = 0 is Euler's.

    eta: 0 (default, the paper's DDIM) is deterministic, 1 is ancestral (DDPM); 0 to 1.
    noise: "step" (default), drawn for every step; "path", the increment of a Brownian path per
        image, which makes runs of other numbers of steps similar.
    """

    eta: Annotated[float, Ge(0), Le(1), DocInfo("0 is deterministic")] = 0.0
    noise: NoiseKind = "step"

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, eq. 12, 16"
    )

    @property
    def convergence(self) -> float | None:
        return None if self.stochastic else 1.0

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        a, b = span.now, span.next
        if self.eta == 0:
            return Move(euler(pred, span), 0.0, state)
        tau = self.eta**2 * (1 - _share(a, b) ** 2)
        mean = b.alpha * pred.x0 + b.sigma * sqrt(1 - tau) * pred.eps
        return Move(mean, b.sigma * sqrt(tau), state, interval(span, self.noise))

    def error_term(self, pred: Prediction, move: Move, span: Span, state: Any) -> Lin:
        return pred.x0

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        return next_order(spans, 1, k=share("eta", spans[-1], self.eta).k)


def _share(a: Level, b: Level) -> Any:
    """alpha·sigma' / (alpha'·sigma), and 1 for finished samples of level tensors (sigma = 0)."""
    if isinstance(a.sigma, float):
        return a.alpha * b.sigma / (b.alpha * a.sigma)
    left = a.sigma != 0
    share = a.alpha * b.sigma / (b.alpha * a.sigma.where(left, a.sigma + 1))
    return share.where(left, share + 1)
