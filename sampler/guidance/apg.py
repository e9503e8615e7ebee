"""Adaptive projected guidance: CFG without its pull along the conditional prediction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge, Le
from sampler_kernels import gram, where

from sampler.guidance.cfg import Rescale, rescaled
from sampler.guidance.gates import Axes, Interval, Scale, Window, active, is_one
from sampler.guidance.spaces import Space, from_space, in_space
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Lin, Prediction, Span

Radius = Annotated[float, Ge(0), DocInfo("0 is off")]
R_REL = 0.0586  # 15/√(4·128·128), the paper's clip at SDXL's 1024²


@register("guidance", "apg")
@dataclass(frozen=True)
class APG(GuidanceBase):
    """Adaptive projected guidance: momentum, norm clip and projection of the guidance direction.

        m  = (c − u) + β·m_before                   m_before = 0 at the first guided step
        s  = min(1, r/‖m‖)
        k  = <m, c> / <c, c>
        g  = c + (w − 1)·s·(m − (1 − η)·k·c)        i.e. of m's part along c only the share η stays

    in the space of x0, per row; the clip acts on the averaged direction, and m is kept as it is.
    Two evaluations per step; one where w = 1 or outside the interval or window, where g = c and m
    is unchanged. A solver that evaluates twice per step advances m at both evaluations.

    scale: w >= 0, 1 is the conditional model. 7.5 is Stable Diffusion's; APG tolerates more than
    CFG.
    eta: η, any number; 0 (the paper's recommendation) drops the parallel part, 1 keeps it.
    momentum: β in −1..1; 0 (default) is off, −0.5 the paper's for SDXL (table 10). With few steps
        a negative β swings from step to step and clips more values than CFG does.
    norm_threshold: r in units of the latents, 15 is the paper's for SDXL at 1024²; 0 is off. By
        default the clip is relative.
    r_rel: r/√n, n the elements that a norm covers, so that one value serves all resolutions; 0 is
        off. 0.0586 unless norm_threshold is given: 15 at SDXL's 1024². Our addition.
    space: "x0" (the paper's), "eps", "v", "velocity", or "native" (the network's own output, as
        in diffusers' guider and ACE-Step).
    formulation: "paper", or "diffusers" with u + w·s·(...), which is the guider's default; the two
        agree only for η = 1 without clip and momentum.
    axes: dimensions that norms and products cover; None is all but the batch. ACE-Step: time only.
    against: what c is pushed away from: "uncond", or "weak" for projected Autoguidance.
    rescale: as for `cfg`. It is measured in the network's own output.
    interval, window: as for `cfg`.

    The paper's setting is {"name": "apg", "momentum": −0.5, "norm_threshold": 15}, the preset
    `apg_paper`. Defaults differ from it because 15 hardly clips latents below 1024² and β depends
    on the number of steps (docs/guidance.md).

    Deviations: k = 0 where c = 0 (the formula divides 0 by 0).
    """

    scale: Scale = 7.5
    eta: float = 0.0
    momentum: Annotated[float, Ge(-1), Le(1), DocInfo("the paper uses −0.75 to −0.25")] = 0.0
    norm_threshold: Radius | None = None
    r_rel: Radius | None = None
    space: Space = "x0"
    formulation: Literal["paper", "diffusers"] = "paper"
    axes: Axes | None = None
    against: Literal["uncond", "weak"] = "uncond"
    rescale: Rescale = 0.0
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models "
        "(Sadat et al., 2024), arXiv:2410.02416, algorithm 1"
    )

    def __post_init__(self) -> None:
        if self.norm_threshold and self.r_rel:
            raise ValueError(
                f"apg: norm_threshold = {self.norm_threshold} and r_rel = {self.r_rel} both set "
                "the clip; give one of them."
            )
        if abs(self.momentum) == 1:
            warnings.warn(
                f"apg: momentum = {self.momentum} does not decay; use −0.75..−0.25.",
                stacklevel=3,
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if is_one(self.scale) else {"cond", self.against})

    def start(self, cond: Cond) -> Any:
        return None

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        if is_one(self.scale) or not active(self.interval, self.window, span):
            return {"cond": Branch(cond.cond)}
        if self.against == "weak":
            return {"weak": Branch(cond.cond, model="weak"), "cond": Branch(cond.cond)}
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        cond = preds["cond"]
        if self.against not in preds or is_one(self.scale):
            return cond, state
        c, u = in_space(cond, self.space), in_space(preds[self.against], self.space)
        mean = c - u
        if state is not None and self.momentum:
            mean = mean + self.momentum * Lin.of(state)
        update = self._update(mean, c)
        base, gain = (c, self.scale - 1) if self.formulation == "paper" else (u, self.scale)
        guided = from_space(cond, self.space, base + gain * update)
        if self.rescale:
            value = rescaled(in_space(guided, cond.kind), cond.out, self.rescale)
            guided = cond.like(value)
        return guided, mean if self.momentum else state

    def _update(self, mean: Lin, cond: Lin) -> Lin:
        """s·(m − (1 − η)·k·c)."""
        products = gram(mean, cond, axes=self.axes)
        square = products[1, 1]
        share = products[0, 1] / where(square == 0, square + 1, square)
        update = mean - cond * ((1 - self.eta) * share)
        if radius := self._radius(mean):
            # r / max(‖m‖, r) is min(1, r/‖m‖) without a division by 0
            update = update * (radius / products[0, 0].clamp(min=radius**2).sqrt())
        return update

    def _radius(self, mean: Lin) -> float:
        if self.norm_threshold is not None and not self.r_rel:
            return self.norm_threshold
        shape = mean.shape
        covered = shape[1:] if self.axes is None else [shape[axis] for axis in self.axes]
        relative = R_REL if self.r_rel is None else self.r_rel
        return relative * math.sqrt(math.prod(covered))
