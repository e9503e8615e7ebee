"""CFG-Zero*: CFG for flow models with an optimised unconditional scale and a zero start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import DocInfo, Ge
from sampler_kernels import gram, where

from sampler.guidance.gates import Interval, Scale, Window, active, is_one
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Lin, Prediction, Span


@register("guidance", "cfg_zero")
@dataclass(frozen=True)
class CFGZero(GuidanceBase):
    """CFG-Zero*: the unconditional velocity is scaled to fit the conditional one before guiding.

        a = <c, u> / <u, u>,   g = a·u + w·(c − a·u);   g = 0 in the first zero_init_steps steps

    per row, on the network's own output (the flow velocity). The first steps cost no evaluation:
    x stands still there. Two evaluations per step after that; one where w = 1 or outside the
    interval or window (g = c).

    scale: w >= 0, 1 is the conditional model. 5.0 as in diffusers' guiders for flow models.
    zero_init_steps: >= 0; 1 is the paper's. Only flow models have it: elsewhere it must be 0.
    interval, window: as for `cfg`.

    Deviation: a = 1 (plain CFG) where u = 0.
    """

    scale: Scale = 5.0
    zero_init_steps: Annotated[int, Ge(0), DocInfo("0 is off")] = 1
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models "
        "(Fan et al., 2025), arXiv:2503.18886"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if is_one(self.scale) else {"cond", "uncond"})

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        if is_one(self.scale) or not active(self.interval, self.window, span):
            return {"cond": Branch(cond.cond)}
        if span.index < self.zero_init_steps:
            if not _is_flow(span):
                raise ValueError(
                    "cfg_zero: the zero start stands for a zero flow velocity, and this model is "
                    "not a flow model; set zero_init_steps = 0."
                )
            return {}
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        if not preds:
            return Prediction.from_velocity(x, Lin.zero(x), span.now), state
        cond = preds["cond"]
        if "uncond" not in preds or is_one(self.scale):
            return cond, state
        c, u = cond.out, preds["uncond"].out
        products = gram(c, u)
        empty = products[1, 1] == 0
        fit = where(empty, products[1, 1] + 1, products[0, 1])
        fit = fit / where(empty, products[1, 1] + 1, products[1, 1])
        return cond.like(fit * u + self.scale * (c - fit * u)), state


def _is_flow(span: Span) -> bool:
    """Return whether alpha + sigma = 1 at both levels (vp and edm: at an end only)."""
    return all(abs(level.alpha + level.sigma - 1) < 1e-6 for level in (span.now, span.next))
