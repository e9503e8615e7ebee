"""Classifier-free guidance with common extensions: rescaling, an interval, a step window."""

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
from sampler.registry.constraints import Nonnegative, Positive
from sampler.types import Branch, Cond, GuidanceBase, Lin, Prediction, Span

Rescale = Annotated[float, Ge(0), Le(1), DocInfo("0 is off")]


@register("guidance", "cfg")
@dataclass(frozen=True)
class CFG(GuidanceBase):
    """Classifier-free guidance: away from the unconditional prediction, along c − u.

        g = u + w·(c − u),   then with rescale φ:  g ← φ·g·std(c)/std(g) + (1 − φ)·g
        tangential:  u ← ½·[(1 + (a − d)/R)·u + (2b/R)·c]      before it
        damp k:      w ← 1 + (w − 1)·exp(−k·‖c − u‖/‖u‖)
        norm_limit:  g ← g·min(1, k·‖c‖/‖g‖)                   after it

    std is per row, unbiased, over all elements. Any parametrisation gives the same g (weights sum
    to one), so the network's own output is combined; rescaling does depend on it. Costs two
    evaluations per step; one where w = 1, w = 0 (without rescale), or outside the interval or the
    window (g = c there).

    scale: w >= 0; 1 is the conditional model, 0 the unconditional one. 7.5 is Stable Diffusion's.
    rescale: φ in 0..1; 0 is off, 0.7 is common for v-prediction models with zero terminal SNR.
    rescale_space: where std is measured; "native" is the network's own output, as in diffusers.
    interval: (low, high] in sigma/alpha (the EDM sigma) where guidance is on; None is everywhere.
    window: [first, last) in steps where guidance is on; None is everywhere.
    match_norm: axes over which the norm of g is set to that of c, (-1,) per token as the pipelines
        of QwenImage do; None is off.
    scales: one scale per step, instead of `scale`; an entry 1 or 0 costs one evaluation.
    tangential: u is replaced by its projection on the first right singular vector of [u; c].
        a = ‖u‖², d = ‖c‖², b = <u, c>, R = sqrt((a − d)² + 4b²): TCFG, without an SVD.
    damp: k >= 0 of MAMBO-G, 8 in diffusers; 0 is off.
    norm_limit: k > 0, over the sample or, with match_norm, over its axes, where g is then only
        ever shortened (Z-Image's `cfg_normalization`, RenormCFG); None is off.

    Deviations: where std(g) = 0 the row is left as it is (the formula divides 0 by 0 there); the
    scale is 1 under damp where u = 0; u stays where R = 0.
    """

    scale: Scale = 7.5
    rescale: Rescale = 0.0
    interval: Interval | None = None
    window: Window | None = None
    rescale_space: Space = "native"
    match_norm: Axes | None = None
    scales: tuple[Nonnegative, ...] | None = None
    tangential: bool = False
    damp: Nonnegative = 0.0
    norm_limit: Positive | None = None

    reference: ClassVar[str] = (
        "Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), arXiv:2207.12598, eq. 6; "
        "rescale: Lin et al. (2023), arXiv:2305.08891, eq. 15-16; "
        "interval: Kynkäänniemi et al. (2024), arXiv:2404.07724; tangential: TCFG (2025), "
        "arXiv:2503.18137; damp: MAMBO-G, as in diffusers"
    )

    def __post_init__(self) -> None:
        if self.scales is not None and (not self.scales or self.scale is not CFG.scale):
            raise ValueError("cfg: give scale, or scales with one number per step, not both.")

    @property
    def needs(self) -> frozenset[str]:
        alone = all(map(is_one, self.scales or (self.scale,))) and not self.tangential
        return frozenset({"cond"} if alone else {"cond", "uncond"})

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        scale = self._scale(span)
        if self._is_cond(scale) or not active(self.interval, self.window, span):
            return {"cond": Branch(cond.cond)}
        if is_zero(scale) and not self._adjusts():
            return {"uncond": Branch(cond.uncond)}
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        scale = self._scale(span)
        if "uncond" not in preds or self._is_cond(scale):
            return preds["cond"], state
        uncond = preds["uncond"]
        if is_zero(scale) and not self._adjusts():
            return uncond, state
        cond = preds["cond"]
        c, u = cond.out, uncond.out
        if self.tangential:
            u = tangential(u, c)
        if self.damp:
            scale = damped(scale, c - u, u, self.damp)
        guided = cond.like(u + scale * (c - u))
        if self.rescale:
            space = self.rescale_space
            value = rescaled(in_space(guided, space), in_space(cond, space), self.rescale)
            guided = from_space(guided, space, value)
        if self.match_norm is not None or self.norm_limit is not None:
            value = in_space(guided, cond.kind)
            if self.norm_limit is None:
                ratio = norm_ratio(c, value, self.match_norm)
            else:
                ratio = limited(c, value, self.norm_limit, self.match_norm)
            guided = cond.like(value * ratio)
        return guided, state

    def _scale(self, span: Span) -> Any:
        """The scale of a step. Raises ValueError where `scales` are not one per step."""
        if self.scales is None:
            return self.scale
        if span.index >= len(self.scales) or span.total not in (0, len(self.scales)):
            raise ValueError(
                f"cfg: there are {len(self.scales)} scales for {span.total or 'more'} steps; give "
                "one per step."
            )
        return self.scales[span.index]

    def _is_cond(self, scale: Any) -> bool:
        """Return True if g = c at this scale, so that u is not needed."""
        return is_one(scale) and not self.tangential

    def _adjusts(self) -> bool:
        """Return True if c is needed even at scale 0."""
        norms = self.match_norm is not None or self.norm_limit is not None
        return bool(self.rescale) or norms or self.tangential or bool(self.damp)


def tangential(uncond: Lin, cond: Lin) -> Lin:
    """The projection of u on the first right singular vector of [u; c], per sample."""
    squares = gram(uncond, cond)
    gap, cross = squares[0, 0] - squares[1, 1], 2 * squares[0, 1]
    root = (gap * gap + cross * cross).sqrt()
    flat = root == 0
    norm = where(flat, root + 1, root)
    along = where(flat, root + 1, (gap / norm + 1) / 2)
    return uncond * along + cond * where(flat, root, cross / norm / 2)


def damped(scale: Any, direction: Lin, uncond: Lin, factor: float) -> Any:
    """1 + (w − 1)·exp(−factor·‖direction‖/‖u‖) per sample; 1 where u = 0."""
    squares = gram(direction, uncond)
    empty = squares[1, 1] == 0
    ratio = (squares[0, 0] / where(empty, squares[1, 1] + 1, squares[1, 1])).sqrt()
    shrink = (ratio * -factor).exp()
    return where(empty, shrink * 0 + 1, (scale - 1) * shrink + 1)


def norm_ratio(of: Lin, to: Lin, axes: tuple[int, ...] | None) -> Any:
    """‖of‖/‖to‖ over these axes, None for the whole sample; 1 where `to` is 0."""
    squares = gram(of, to, axes=axes)
    flat = squares[1, 1] == 0
    ratio = squares[0, 0] / where(flat, squares[1, 1] + 1, squares[1, 1])
    return where(flat, ratio * 0 + 1, ratio).sqrt()


def limited(of: Lin, to: Lin, limit: float, axes: tuple[int, ...] | None) -> Any:
    """min(1, limit·‖of‖/‖to‖) over these axes, None for the whole sample.

    Over axes 1e-8 is added to ‖to‖, as in ComfyUI's CFGNorm.
    """
    if axes is None:
        ratio = limit * norm_ratio(of, to, None)
    else:
        squares = gram(of, to, axes=axes)
        ratio = limit * squares[0, 0].sqrt() / (squares[1, 1].sqrt() + 1e-8)
    return where(ratio < 1, ratio, ratio * 0 + 1)


def rescaled(guided: Lin, cond: Lin, phi: float) -> Lin:
    """φ·g·std(c)/std(g) + (1 − φ)·g per row; g itself where std(g) = 0.

    n·var(v) = Σ(v − p)² − (Σ(v − p))²/n for any p: with the row's first element for p, one
    reduction gives both variances, and a large mean does not cancel them.
    """
    count = math.prod(guided.shape[1:])
    sums = gram(guided - pivot(guided), cond - pivot(cond), Lin.ones(guided))
    g_var, c_var = (sums[i, i] - sums[i, 2] * sums[i, 2] / count for i in (0, 1))
    flat = g_var <= 0
    ratio = (c_var.clamp(min=0.0) / where(flat, g_var * 0 + 1, g_var)).sqrt()
    return guided * where(flat, ratio * 0 + 1, phi * ratio + (1 - phi))
