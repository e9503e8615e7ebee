"""CFG++: the target is guided, the direction is the unconditional one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sampler.guidance.gates import is_zero
from sampler.registry import register
from sampler.registry.constraints import Count, Fraction
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span


@register("guidance", "cfg_pp")
@dataclass(frozen=True)
class CFGPP(GuidanceBase):
    """CFG++: renoises with the unconditional noise, so that strengths lie in 0..1.

        x' = alpha'·D_λ + sigma'·ε_u,   D_λ = D_u + λ·(D_c − D_u),   ε_u = (x − alpha·D_u)/sigma

    The prediction has D_λ as its target and ε_u as its direction; samplers with memory keep their
    history of slopes by these. Two evaluations per step; one where λ = 0, the unconditional model.

    For a first-order step it equals `cfg` with the scale λ·r/(r − 1), r = alpha'·sigma/(alpha·
    sigma'): its effect grows with the number of steps. λ = 1 is not the conditional model.

    strength: λ in 0..1.
    reference_steps: the number of steps that `strength` is meant for: λ·reference_steps/steps is
        used, which keeps the mean scale and may exceed 1 (warned of). None uses λ as it is, as the
        paper does.

    The sampler must follow a direction (`follows_direction`): ddim, euler_ancestral, ab, ghvb,
    nesterov, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, res_multistep, er_sde, deis,
    gradient_estimation and heavy_ball over ab or dpmpp_2m do. `sampler.guide` serves the rule in
    pipelines whose scheduler is DDIM without noise or Euler, as `cfg` with that scale.
    """

    strength: Fraction = 0.6
    reference_steps: Count | None = None

    reference: ClassVar[str] = (
        "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models "
        "(Chung et al., 2024), arXiv:2406.08070, algorithm 1"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"uncond"} if is_zero(self.strength) else {"cond", "uncond"})

    @property
    def sets_direction(self) -> bool:
        return True

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        strength = self._strength(span)
        if strength > 1 and span.index == 0:
            warnings.warn(
                f"cfg_pp: strength {self.strength:g} for {self.reference_steps} steps is "
                f"{strength:g} at {span.total} steps, above 1.",
                stacklevel=2,
            )
        if is_zero(strength):
            return {"uncond": Branch(cond.uncond)}
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        uncond, cond = preds["uncond"], preds.get("cond")
        if cond is None:
            return uncond, state
        target = uncond.like(uncond.out + self._strength(span) * (cond.out - uncond.out))
        return replace(target, direction=uncond.eps), state

    def scale_of_cfg(self, span: Span) -> float:
        """Scale of `cfg` that makes the same first-order step: λ·alpha'·σ/(alpha'·σ − alpha·σ')."""
        (_, a, s), (_, a_next, s_next) = span.now, span.next
        return self._strength(span) * a_next * s / (a_next * s - a * s_next)

    def _strength(self, span: Span) -> float:
        if self.reference_steps is None:
            return self.strength
        if not span.total:
            raise ValueError("cfg_pp: reference_steps needs a run of a known number of steps.")
        return self.strength * self.reference_steps / span.total
