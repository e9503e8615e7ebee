"""Heun's method: two evaluations as two steps on a longer grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from sampler.registry import register
from sampler.samplers.coordinates import Space, euler, gain, slope, space_of
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


class HeunState(NamedTuple):
    """The slope of the Euler step that was made, its gain, and the coordinate of both."""

    slope: Any
    gain: float
    space: str


@register("sampler", "heun")
@dataclass(frozen=True)
class Heun(SamplerBase):
    """Heun (trapezoidal rule): an Euler step, then a correction with the slope at its end.

        z' = z + (u' − u)·f(z, u);   z' ← z' + (u' − u)/2·(f(z', u') − f(z, u))

    z, u and f as for `ab`. Every level but the first is visited twice: a run over N levels costs
    2N − 1 evaluations where the last level is sigma = 0 (nothing can be evaluated there), else 2N.
    In eps-space, flow on a flow model; from a level without signal (alpha = 0) in data-space.
    """

    reference: ClassVar[str] = (
        "Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), "
        "arXiv:2206.00364, Algorithm 1 (without churn)"
    )

    @property
    def convergence(self) -> float:
        return 2.0

    @property
    def evaluations(self) -> int:
        return 2

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        doubled = [grid[0]]
        for level in grid[1:]:
            doubled += [level, level]
        return tuple(doubled[:-1] if _no_noise(grid[-1]) else doubled)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if state:
            f = slope(pred, span, state.space)
            return Move(pred.x + state.gain / 2 * (f - Lin.of(state.slope)), 0.0, ())
        space: Space = "data" if _no_signal(span) else space_of(span)
        half = HeunState(slope(pred, span, space), gain(span, space), space)
        return Move(euler(pred, span), 0.0, half)


def _no_noise(level: Level) -> bool:
    """Return True if nothing can be evaluated at a level."""
    return bool(level.sigma == 0.0 if isinstance(level.sigma, float) else (level.sigma == 0).all())


def _no_signal(span: Span) -> bool:
    alpha = span.now.alpha
    return space_of(span) == "eps" and isinstance(alpha, float) and alpha == 0.0
