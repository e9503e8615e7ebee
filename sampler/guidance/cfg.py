"""Classifier-free guidance with its two common companions: rescaling and a guidance interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sampler_kernels import gram, where

from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Level, Lin, Prediction, Span


@register("guidance", "cfg")
@dataclass(frozen=True)
class CFG(GuidanceBase):
    """Classifier-free guidance: away from the unconditional prediction, along c − u.

        g = u + w·(c − u),   then with rescale φ:  g ← φ·g·std(c)/std(g) + (1 − φ)·g

    std is per row, unbiased, over all elements. Any parametrisation gives the same g (weights sum
    to one), so the network's own output is combined. Costs two evaluations per step; one where
    w = 1, w = 0, or the level is outside the interval (g = c there).

    scale: w >= 0; 1 is the conditional model, 0 the unconditional one.
    rescale: φ in 0..1; 0 is off, 0.7 is common for v-prediction models with zero terminal SNR.
    interval: (low, high] in sigma/alpha (the EDM sigma) where guidance is on; None is everywhere.
    """

    scale: float = 7.5
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    reference: ClassVar[str] = (
        "Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), arXiv:2207.12598, eq. 6; "
        "rescale: Lin et al. (2023), arXiv:2305.08891, eq. 15-16; "
        "interval: Kynkäänniemi et al. (2024), arXiv:2404.07724"
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"cfg: scale = {self.scale} must be a number >= 0 (1 is no guidance).")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"cfg: rescale = {self.rescale} must lie in 0..1 (0 is off).")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"cfg: interval = {self.interval} must be (low, high) with 0 <= low < high."
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if self._is_one() else {"cond", "uncond"})

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        if self.scale == 0 and inside(self.interval, span.now):
            return {"uncond": Branch(cond.uncond)}
        if self._is_one() or not inside(self.interval, span.now):
            return {"cond": Branch(cond.cond)}
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        if self.scale == 0 and "uncond" in preds:
            return preds["uncond"], state
        if "uncond" not in preds or self._is_one():
            return preds["cond"], state
        c, u = preds["cond"].out, preds["uncond"].out
        guided = u + self.scale * (c - u)
        if self.rescale:
            guided = rescaled(guided, c, self.rescale)
        return preds["cond"].like(guided), state

    def _is_one(self) -> bool:
        return math.isclose(self.scale, 1, rel_tol=1e-9)


def inside(interval: tuple[float, float] | None, level: Level) -> bool:
    """Whether low < sigma/alpha <= high: open below, closed above; always without an interval."""
    if interval is None:
        return True
    sigma = level.sigma / level.alpha if level.alpha else math.inf
    return interval[0] < sigma <= interval[1]


def rescaled(guided: Lin, cond: Lin, phi: float) -> Lin:
    """φ·g·std(c)/std(g) + (1 − φ)·g per row; g itself where std(g) = 0."""
    ones = Lin.ones(guided)
    count = math.prod(guided.shape[1:])
    sums = gram(guided, cond, ones)[2]
    g_centred, c_centred = guided - (sums[0] / count) * ones, cond - (sums[1] / count) * ones
    squares = gram(g_centred, c_centred)
    flat = squares[0, 0] == 0
    ratio = (squares[1, 1] / where(flat, squares[0, 0] + 1, squares[0, 0])).sqrt()
    return guided * where(flat, ratio * 0 + 1, phi * ratio + (1 - phi))
