"""Classifier-free guidance, with rescaling, an interval and a step window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import DocInfo, Ge, Le
from sampler_kernels import gram, pivot, where

from sampler.guidance.gates import Axes, Interval, Scale, Window, active, is_one, is_zero
from sampler.guidance.spaces import Space, from_space, in_space
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Lin, Prediction, Span

Rescale = Annotated[float, Ge(0), Le(1), DocInfo("0 is off")]


@register("guidance", "cfg")
@dataclass(frozen=True)
class CFG(GuidanceBase):
    """Classifier-free guidance: away from the unconditional prediction, along c − u.

        g = u + w·(c − u),   then with rescale φ:  g ← φ·g·std(c)/std(g) + (1 − φ)·g

    std is per sample, unbiased, over all elements. Any parametrisation gives the same g (weights
    sum to one), so the network's own output is combined; rescaling does depend on it. Costs two
    evaluations per step; one where w = 1, w = 0 (without rescale), or outside the interval or the
    window (g = c there).

    scale: w; 1 is the conditional model, 0 the unconditional one. 7.5 is Stable Diffusion's.
    rescale: φ; 0.7 is common for v-prediction models with zero terminal SNR.
    rescale_space: where std is measured; "native" is the network's own output, as in diffusers.
    interval: (low, high] in sigma/alpha (the EDM sigma) where guidance is on; None is everywhere.
    window: [first, last) in steps where guidance is on; None is everywhere.
    match_norm: axes over which the norm of g is set to that of c, (-1,) per token as the pipelines
        of QwenImage do; None is off.

    Deviation: g is not rescaled where std(g) = 0 (the formula divides 0 by 0 there).
    """

    scale: Scale = 7.5
    rescale: Rescale = 0.0
    interval: Interval | None = None
    window: Window | None = None
    rescale_space: Space = "native"
    match_norm: Axes | None = None

    reference: ClassVar[str] = (
        "Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), arXiv:2207.12598, eq. 6; "
        "rescale: Lin et al. (2023), arXiv:2305.08891, eq. 15-16; "
        "interval: Kynkäänniemi et al. (2024), arXiv:2404.07724"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if is_one(self.scale) else {"cond", "uncond"})

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        if is_one(self.scale) or not active(self.interval, self.window, span):
            return {"cond": Branch(cond.cond)}
        if is_zero(self.scale) and not self._adjusts():
            return {"uncond": Branch(cond.uncond)}
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        if "uncond" not in preds or is_one(self.scale):
            return preds["cond"], state
        uncond = preds["uncond"]
        if is_zero(self.scale) and not self._adjusts():
            return uncond, state
        cond = preds["cond"]
        guided = cond.like(uncond.out + self.scale * (cond.out - uncond.out))
        if self.rescale:
            space = self.rescale_space
            value = rescaled(in_space(guided, space), in_space(cond, space), self.rescale)
            guided = from_space(guided, space, value)
        if self.match_norm is not None:
            value = in_space(guided, cond.kind)
            guided = cond.like(value * norm_ratio(cond.out, value, self.match_norm))
        return guided, state

    def _adjusts(self) -> bool:
        """True where g is adjusted to c, so that c is needed even at scale 0."""
        return bool(self.rescale) or self.match_norm is not None


def norm_ratio(of: Lin, to: Lin, axes: tuple[int, ...]) -> Any:
    """‖of‖/‖to‖ over these axes; 1 where `to` is 0."""
    squares = gram(of, to, axes=axes)
    flat = squares[1, 1] == 0
    ratio = squares[0, 0] / where(flat, squares[1, 1] + 1, squares[1, 1])
    return where(flat, ratio * 0 + 1, ratio).sqrt()


def rescaled(guided: Lin, cond: Lin, phi: float) -> Lin:
    """φ·g·std(c)/std(g) + (1 − φ)·g per sample; g itself where std(g) = 0.

    n·var(v) = Σ(v − p)² − (Σ(v − p))²/n for any p: with the sample's first element for p, one
    reduction gives both variances, and a large mean does not cancel them.
    """
    count = math.prod(guided.shape[1:])
    sums = gram(guided - pivot(guided), cond - pivot(cond), Lin.ones(guided))
    g_var, c_var = (sums[i, i] - sums[i, 2] * sums[i, 2] / count for i in (0, 1))
    flat = g_var <= 0
    ratio = (c_var.clamp(min=0.0) / where(flat, g_var * 0 + 1, g_var)).sqrt()
    return guided * where(flat, ratio * 0 + 1, phi * ratio + (1 - phi))
