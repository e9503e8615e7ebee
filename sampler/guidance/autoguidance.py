"""Autoguidance: extrapolation away from a weaker network with the same condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.guidance.gates import Interval, Scale, Window, active, is_one
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span


@register("guidance", "autoguidance")
@dataclass(frozen=True)
class Autoguidance(GuidanceBase):
    """Autoguidance: extrapolates from a weak network's prediction through the main one's.

        g = D0 + w·(D1 − D0),   D1 the main network, D0 a smaller or less trained one

    both given the same condition; any parametrisation gives the same g. One main and one weak row
    per step; the weak network is not called where w = 1 or outside the interval or window.
    With CFG on top (g = D1 + (w_a − 1)(D1 − D0) + (w_c − 1)(D1 − D_uncond)): the rule `sum`.

    scale: w >= 0, 1 is the main network alone. 2.0 is near the paper's best on ImageNet-512.
    weak: the name of the weak network among the denoiser's models.
    interval, window: as for `cfg`.
    """

    scale: Scale = 2.0
    weak: str = "weak"
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024), "
        "arXiv:2406.02507, eq. 1"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if is_one(self.scale) else {"cond", self.weak})

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        if is_one(self.scale) or not active(self.interval, self.window, span):
            return {"cond": Branch(cond.cond)}
        return {"weak": Branch(cond.cond, model=self.weak), "cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        if "weak" not in preds or is_one(self.scale):
            return preds["cond"], state
        main, weak = preds["cond"], preds["weak"]
        if weak.out.shape != main.out.shape:
            raise ValueError(
                f"autoguidance: the weak network returns {tuple(weak.out.shape)} and the main "
                f"one answers {tuple(main.out.shape)}; both must work on the same latents."
            )
        return main.like(weak.out + self.scale * (main.out - weak.out)), state
