"""Euler ancestral: a DDIM step to a level below, and noise back up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sampler.registry import register
from sampler.registry.constraints import Fraction, Nonnegative
from sampler.samplers.coordinates import is_flow
from sampler.samplers.exponential import falling, line, next_order, noisy
from sampler.samplers.shares import NoiseKind, Share, share
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


@register("sampler", "euler_ancestral")
@dataclass(frozen=True)
class EulerAncestral(SamplerBase):
    """Euler ancestral ("Euler a"): a first-order step, part of whose noise is drawn anew.

        x' = alpha'·x0 + sigma'·(k·eps + s_noise·sqrt(1 − k²)·z),   z ~ N(0, I)
        k² = 1 − eta²·(1 − (rho'/rho)²),   rho = sigma/alpha
        on flow levels k = rho_d/rho', of sigma_d = sigma'·(1 + eta·(sigma'/sigma − 1))

    With eta = 1 and form "vp" it is DDPM, as is `ddim` with eta = 1. Smooth results: with few steps
    first-order noise loses contrast.

    eta: 0 (DDIM) to 1 (default).
    s_noise: factor on the noise; 1 keeps the level's amount.
    form: "auto" (default) has the second k on flow models; "vp" the first one everywhere.
    noise: as for `ddim`.
    """

    eta: Fraction = 1.0
    s_noise: Nonnegative = 1.0
    form: Literal["auto", "vp"] = "auto"
    noise: NoiseKind = "step"

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, eq. 16; "
        "k-diffusion's sample_euler_ancestral, on flow models ComfyUI's"
    )

    @property
    def convergence(self) -> float | None:
        return None if self.stochastic else 1.0

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid itself. Raises ValueError for a level that is not below the one before."""
        return falling("euler_ancestral", grid)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        k, fresh = self._share(span)
        return noisy(self, line(pred, span, k=k), span, fresh, state)

    def error_term(self, pred: Prediction, move: Move, span: Span, state: Any) -> Lin:
        return pred.x0

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        return next_order(spans, 1, k=self._share(spans[-1]).k)

    def _share(self, span: Span) -> Share:
        policy = "flow" if self.form == "auto" and is_flow(span) else "eta"
        return share(policy, span, self.eta)
