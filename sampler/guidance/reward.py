"""Universal guidance: moves the predicted clean image up the gradient of any reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import GuidanceContext
from sampler.guidance.gates import Interval, Strength, Window, active
from sampler.registry import register
from sampler.registry.constraints import Positive
from sampler.samplers.measurement import posterior_variance
from sampler.types import Cond, GuidanceBase, Lin, Prediction, Span

if TYPE_CHECKING:
    from torch import Tensor


@register("guidance", "reward")
@dataclass(frozen=True)
class RewardGuidance(GuidanceBase):
    """Universal guidance: the inner rule's x0, moved along the gradient of a reward of its image.

        D' = D + s·r²·∇_D R(dec(D)),    r² = v·sigma²/(v·alpha² + sigma²)

    per row, D the inner rule's x0 and dec the pipeline's decoder. Where R is the logarithm of a
    likelihood, s = 1 is Bayes' rule for data of variance v. No pass of the network is added, and
    it is never differentiated: the forward form of universal guidance, with its Jacobian taken as
    the identity. The gradient is a constant to autograd. `classifier` with at="x0" is the same
    with the log-probability of the prompt's class.

    reward: a reward by name, {"name": ...}, or a function (images [B, 3, H, W] in [0, 1], prompts)
        -> scores [B] with a gradient.
    strength: s >= 0, in nats per unit of the reward; 0 is no guidance.
    v: variance that is assumed of x0, per element; latents are scaled to 1.
    rule: the rule whose x0 is moved.
    interval, window: as for `cfg`; outside, the inner rule alone.
    """

    reward: Any = field(metadata={"kind": "reward"})
    strength: Strength = 1.0
    v: Positive = 1.0
    rule: Any = field(default="none", metadata={"kind": "guidance"})
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "Universal Guidance for Diffusion Models (Bansal et al., 2023), arXiv:2302.07121, eq. 6"
    )

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def sets_direction(self) -> bool:
        """Return True if the inner rule keeps a direction apart from its target."""
        return self.rule.sets_direction

    @property
    def graph_refusal(self) -> str:
        return "the rule 'reward' differentiates a reward at every step"

    def check(self, adapter: PipelineAdapter) -> None:
        self.rule.check(adapter)

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[RewardGuidance, Cond]:
        """The inner rule bound, and the reward as a function of latents for these prompts.

        Raises ValueError for a reward without gradient and for videos; SamplerError for one whose
        files are missing.
        """
        name = getattr(self.reward, "name", "") or getattr(self.reward, "__name__", "function")
        if not getattr(self.reward, "differentiable", True):
            raise ValueError(f"reward: {name!r} has no gradient; use a differentiable reward.")
        if context.adapter.frames is not None:
            raise ValueError("reward: it scores images, and this pipeline generates videos.")
        if load := getattr(self.reward, "check", None):
            load()
        rule, cond = self.rule.bind(context, cond)
        bound, prompts = replace(self, rule=rule), list(context.prompts)

        def score(x0: Tensor) -> Tensor:
            scores = self.reward(context.adapter.decode(x0), prompts)
            if not getattr(scores, "requires_grad", False):
                raise ValueError(
                    f"reward: the scores of {name!r} have no gradient; compute them with torch, "
                    "without detach(), item() or numpy()."
                )
            return scores

        object.__setattr__(bound, "_score", score)
        return bound, cond

    def start(self, cond: Cond) -> Any:
        if self._scored is None:
            raise ValueError(
                "reward: it scores images and needs generate(), whose pipeline decodes."
            )
        return self.rule.start(cond)

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Any]:
        return self.rule.plan(x, span, cond, state)

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        pred, state = self.rule.combine(x, preds, span, state)
        level, score = span.now, self._scored
        if score is None or not active(self.interval, self.window, span):
            return pred, state
        gain = self.strength * posterior_variance(self.v, level.alpha, level.sigma)
        gradient = _slope(score, pred.x0.tensor())
        return Prediction.from_x0(
            x, pred.x0 + gain * Lin.of(gradient), level, pred.direction
        ), state

    @property
    def _scored(self) -> Callable[[Tensor], Tensor] | None:
        return vars(self).get("_score")


def _slope(score: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """∇ Σ_b R(at_b): a sum over rows, so that a row's gradient is its own."""
    import torch

    with torch.enable_grad():
        leaf = at.detach().clone().requires_grad_()
        return torch.autograd.grad(score(leaf).sum(), leaf)[0]
