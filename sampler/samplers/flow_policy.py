"""Stochastic steps of reward fine-tuning on flow models: Flow-SDE, Dance-SDE and CPS.

All of them have the form

    x' = alpha'·x0 + c·eps + s·z,   z ~ N(0, I)

and differ in the deviation s and in c only; x0 and eps are the network's estimates. With
c = sqrt(sigma'² − s²) the noise of x' is exactly that of its level, as in DDIM. The published SDEs
take c = sigma' − s²/(2·sigma), its linearisation, which leaves excess noise of variance
s²·(sigma − sigma')/sigma + s⁴/(4·sigma²) in every step, so that images of few steps stay noisy.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge, Le
from sampler_kernels import sqrt

from sampler.registry import register
from sampler.samplers.coordinates import euler, is_flow
from sampler.samplers.shares import NoiseKind, interval
from sampler.types import Level, Move, Prediction, SamplerBase, Span, spans


@dataclass(frozen=True)
class _FlowPolicy(SamplerBase):
    """Common part; a subclass gives the deviation of a step.

    noise_level: eta. noisy: (first, end), the steps first to end − 1 draw noise and all others are
    DDIM steps; None: all steps draw. noise: as for `ddim`.
    """

    noise_level: Annotated[float, Ge(0), DocInfo("0 is DDIM")] = 0.7
    noisy: tuple[int, int] | None = None
    noise: NoiseKind = "step"

    def __post_init__(self) -> None:
        if self.noisy is not None and not 0 <= self.noisy[0] < self.noisy[1]:
            raise ValueError(
                f"{self.name}: noisy = {list(self.noisy)} must be (first, end) with "
                "0 <= first < end."
            )

    @property
    def convergence(self) -> float | None:
        return None if self.stochastic else 1.0

    @property
    def stochastic(self) -> bool:
        return self.noise_level > 0

    def is_noisy(self, index: int) -> bool:
        """Return whether the step of this index draws noise."""
        inside = self.noisy is None or self.noisy[0] <= index < self.noisy[1]
        return self.noise_level > 0 and inside

    def deviation(self, span: Span) -> Any:
        """The standard deviation s of a step."""
        raise NotImplementedError

    def direction(self, span: Span, s: Any) -> Any:
        """The coefficient c of eps: sqrt(sigma'² − s²)."""
        return sqrt(span.next.sigma**2 - s * s)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if not self.is_noisy(span.index):
            return Move(euler(pred, span), 0.0, state)
        s = self.deviation(span)
        mean = span.next.alpha * pred.x0 + self.direction(span, s) * pred.eps
        return Move(mean, s, state, interval(span, self.noise))


@register("sampler", "cps")
@dataclass(frozen=True)
class CPS(_FlowPolicy):
    """Coefficients-preserving sampling: stochastic steps that leave no excess noise.

        x' = alpha'·x0 + sigma'·(cos(eta·pi/2)·eps + sin(eta·pi/2)·z),   z ~ N(0, I)

    For any process. eta = 0 is DDIM, eta = 1 draws all noise anew, as consistency sampling does;
    the last step draws none.

    noise_level: eta, 0 to 1; 0.7 by default, 0.8 in published recipes.
    noisy: (first, end), the steps first to end − 1 draw noise and all others are DDIM steps; None
        (default): all steps draw.
    noise: as for `ddim`.
    """

    noise_level: Annotated[float, Ge(0), Le(1), DocInfo("0 is DDIM")] = 0.7

    reference: ClassVar[str] = (
        "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching (Wang & "
        "Yu, 2025), arXiv:2509.05952; as in Flow-GRPO's published code"
    )

    def deviation(self, span: Span) -> Any:
        return span.next.sigma * math.sin(self.noise_level * math.pi / 2)

    def direction(self, span: Span, s: Any) -> Any:
        return span.next.sigma * math.cos(self.noise_level * math.pi / 2)


@dataclass(frozen=True)
class _FlowSDE(_FlowPolicy):
    """An Euler-Maruyama step of a reverse SDE on flow matching's levels.

    coefficient: "euler" is the published c, "exact" keeps the noise of the level, with s at most
    sigma'.
    """

    coefficient: Literal["euler", "exact"] = "euler"

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid itself, with a warning where steps cannot draw the published s.

        Raises ValueError for a grid that is not flow matching's.
        """
        if not all(map(is_flow, spans(grid))):
            raise ValueError(
                f"{self.name} needs a flow-matching model (alpha = 1 − sigma); use cps or ddim "
                "with eta > 0 for this one."
            )
        if self.coefficient == "exact":
            noisy = [span for span in spans(grid) if self.is_noisy(span.index)]
            high = [span for span in noisy if self._published(span) > span.next.sigma > 0]
            if high:
                warnings.warn(
                    f"{self.name}: with coefficient = 'exact', {len(high)} of {len(noisy)} steps "
                    f"draw less noise than noise_level = {self.noise_level:g} asks for: s is "
                    "sigma', the noise of the next level.",
                    stacklevel=3,
                )
        return grid

    def deviation(self, span: Span) -> Any:
        s = self._published(span)
        return s if self.coefficient == "euler" else _minimum(s, span.next.sigma)

    def _published(self, span: Span) -> Any:
        return self.noise_level * sqrt(self.rate(span) * (span.now.sigma - span.next.sigma))

    def rate(self, span: Span) -> Any:
        """The squared diffusion coefficient of the SDE at noise level 1."""
        raise NotImplementedError

    def direction(self, span: Span, s: Any) -> Any:
        if self.coefficient == "exact":
            return super().direction(span, s)
        return span.next.sigma - s * s / (2 * span.now.sigma)


@register("sampler", "flow_sde")
@dataclass(frozen=True)
class FlowSDE(_FlowSDE):
    """Flow-GRPO's SDE step, as a policy on flow models.

        x' = alpha'·x0 + c·eps + s·z,   z ~ N(0, I)
        s² = eta²·sigma/(1 − sigma)·(sigma − sigma'),   c = sigma' − s²/(2·sigma)

    At sigma = 1, the first step, sigma' takes the place of sigma in 1 − sigma. The published c
    leaves noise in the image: with eta 0.7 a deviation of 0.08, 0.04, 0.02 after 10, 20, 40 steps.

    noise_level: eta, at least 0; 0.7 by default, as in the published code.
    noisy: (first, end), the steps first to end − 1 draw noise and all others are DDIM steps; None
        (default): all steps draw.
    noise: as for `ddim`.
    coefficient: "euler" (default) is the published c; "exact" is c = sqrt(sigma'² − s²), with s at
        most sigma', which leaves no noise.
    """

    reference: ClassVar[str] = (
        "Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025), "
        "arXiv:2505.05470, eq. 9 and 12"
    )

    def rate(self, span: Span) -> Any:
        now, after = span.now, span.next
        return now.sigma / _where_zero(now.alpha, after.alpha)


@register("sampler", "dance_sde")
@dataclass(frozen=True)
class DanceSDE(_FlowSDE):
    """DanceGRPO's SDE step, as a policy on flow models.

        x' = alpha'·x0 + c·eps + s·z,   z ~ N(0, I)
        s² = eta²·(sigma − sigma'),   c = sigma' − s²/(2·sigma)

    noise_level: eta, at least 0; 0.7 by default, 0.3 in the published recipe for Flux.
    noisy: (first, end), the steps first to end − 1 draw noise and all others are DDIM steps; None
        (default): all steps draw.
    noise: as for `ddim`.
    coefficient: "euler" (default) is the published c; "exact" is c = sqrt(sigma'² − s²), with s at
        most sigma', which leaves no noise.
    """

    reference: ClassVar[str] = (
        "DanceGRPO: Unleashing GRPO on Visual Generation (Xue et al., 2025), arXiv:2505.07818, "
        "eq. 8; its published code"
    )

    def rate(self, span: Span) -> Any:
        return 1.0


def _where_zero(value: Any, other: Any) -> Any:
    """`value`, and `other` where it is 0; numbers or tensors [B]."""
    if isinstance(value, (int, float)):
        return value if value > 0 else other
    return value.where(value > 0, other)


def _minimum(a: Any, b: Any) -> Any:
    """The smaller of two numbers or tensors [B]."""
    return min(a, b) if isinstance(a, (int, float)) else a.minimum(b)
