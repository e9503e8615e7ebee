"""Multistep consistency sampling: jump to x0, noise again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.registry import register
from sampler.types import Move, Prediction, SamplerBase, Span


@register("sampler", "consistency")
@dataclass(frozen=True)
class Consistency(SamplerBase):
    """Consistency-model / LCM multistep sampling: to x0 in one jump, then noise of the next level.

        x' = alpha'·x0 + sigma'·z,   z ~ N(0, I)

    For networks trained to predict x0 in one step; 1 to 8 steps. The last step (sigma' = 0) draws
    no noise. The boundary factors c_skip, c_out of latent consistency models are left out: at the
    lowest timestep of their grids, 19, c_skip is 7e-6.
    """

    reference: ClassVar[str] = (
        "Consistency Models (Song et al., 2023), arXiv:2303.01469, Algorithm 1; Latent Consistency "
        "Models (Luo et al., 2023), arXiv:2310.04378, Algorithm 3"
    )

    @property
    def convergence(self) -> None:
        return None

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        return Move(span.next.alpha * pred.x0, span.next.sigma, state)
