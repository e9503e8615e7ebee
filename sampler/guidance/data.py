"""Measurement guidance: moves x0 towards a measurement, under any sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import GuidanceContext
from sampler.guidance.gates import Interval, Window, active
from sampler.registry import register
from sampler.registry.constraints import Count, Positive
from sampler.samplers.measurement import (
    MIN_ALPHA,
    Measurement,
    Range,
    measurement,
    posterior_variance,
)
from sampler.types import Cond, GuidanceBase, Prediction, Span


@register("guidance", "data")
@dataclass(frozen=True)
class Data(GuidanceBase):
    """Fit of a measurement y = A(x0) + s·n: the inner rule's x0, moved as far as its error allows.

        D' = argmin_x  ‖y − A(x)‖²/(2·s²) + ‖x − D‖²/(2·r²),    r² = v·sigma²/(v·alpha² + sigma²)

    per row, D the inner rule's x0; for linear A by conjugate gradients

        D' = D + (AᵀA/s² + I/r²)⁻¹·Aᵀ(y − A·D)/s²

    The network is never differentiated. The samples fit y; their spread is not that of the
    posterior (the sampler `daps` has that). Steps with alpha < 0.05, whose D is the mean of all
    data, are left to the inner rule. The change is a constant to autograd.

    operator, y, space, data_range: as for the sampler `reddiff`; y may also have one row per image
        of the batch.
    noise: s, standard deviation of the measurement's noise in units of [-1, 1].
    v: variance that is assumed of x0, per element; latents are scaled to 1.
    cg: iterations of the linear system. gn: Gauss–Newton steps, for non-linear operators.
    rule: the rule whose x0 is moved; guidance by prompts belongs here.
    interval, window: as for `cfg`; outside, the inner rule alone.
    """

    operator: Any
    y: Any
    noise: Positive
    v: Positive = 1.0
    cg: Count = 4
    gn: Count = 1
    rule: Any = field(default="none", metadata={"kind": "guidance"})
    space: Literal["model", "image"] = "model"
    data_range: Range | None = None
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "Denoising Diffusion Models for Plug-and-Play Image Restoration (Zhu et al., 2023), "
        "arXiv:2305.08995, eq. 13, with the variance of Pseudoinverse-Guided Diffusion Models "
        "(Song et al., 2023)"
    )

    def __post_init__(self) -> None:
        made = measurement(self.operator, self.y, data_range=self.data_range, name=self.name)
        object.__setattr__(self, "_measured", made)

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def sets_direction(self) -> bool:
        """Return True if the inner rule keeps a direction apart from its target."""
        return self.rule.sets_direction

    @property
    def graph_refusal(self) -> str:
        return "the rule 'data' differentiates the operator at every step"

    def check(self, adapter: PipelineAdapter) -> None:
        self.rule.check(adapter)

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Data, Cond]:
        """The inner rule bound, and A ∘ decode as the operator where y belongs to the image."""
        rule, cond = self.rule.bind(context, cond)
        bound = replace(self, rule=rule)
        if self.space == "image":
            through = self._measurement.through(context.adapter.unclamped(), context.size)
            object.__setattr__(bound, "_measured", through)
        return bound, cond

    def start(self, cond: Cond) -> Any:
        if self.space == "image" and not self._measurement.decoded:
            raise ValueError("data: space = 'image' needs generate(), whose pipeline decodes.")
        return self.rule.start(cond)

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Any]:
        return self.rule.plan(x, span, cond, state)

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        import torch

        from sampler.samplers.proximal import nearest

        pred, state = self.rule.combine(x, preds, span, state)
        level = span.now
        if not active(self.interval, self.window, span):
            return pred, state
        alpha = torch.as_tensor(level.alpha)
        if bool((alpha < MIN_ALPHA).all()):
            return pred, state
        measured, centre = self._measurement, pred.x0.tensor()
        r2 = posterior_variance(self.v, level.alpha, level.sigma)
        # rows without signal keep their x0
        r2 = torch.as_tensor(r2) * (alpha >= MIN_ALPHA)
        y = measured.rows(centre)
        moved = nearest(measured, y, centre, self.noise, r2, self.cg, self.gn)
        return Prediction.from_x0(x, moved, level, pred.direction), state

    @property
    def _measurement(self) -> Measurement:
        return vars(self)["_measured"]
