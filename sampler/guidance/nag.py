"""Normalized attention guidance: a negative prompt without classifier-free guidance."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge, Gt, Le

from sampler.core.binding import GuidanceContext
from sampler.core.regime import regime
from sampler.guidance.gates import Interval, Window, active, is_one, is_zero
from sampler.registry import build, register
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("sampler")
NEGATIVE = "negative"  # in Cond.extra: the conditions of a rule's own negative prompt


@register("guidance", "nag")
@dataclass(frozen=True)
class NAG(GuidanceBase):
    """Normalized attention guidance: away from a negative prompt inside the attention layers.

        z̃ = z⁺ + (s − 1)·(z⁺ − z⁻)         z±: the same queries attend to the two prompts
        ρ = ‖z̃‖₁ / ‖z⁺‖₁                    per token, over all heads
        z = α·z̃·min(1, τ/ρ) + (1 − α)·z⁺

    For few-step models, whose images CFG spoils or whose scale is an input. In UNets the
    cross-attention alone is done twice, for one evaluation. Transformers take two evaluations: both
    prompts go through the network, and the image's tokens attend to both.

    rule: the rule inside, which plans everything else: "none", `embedded`, `student`, or one with
        an unconditional branch, whose conditional branch is guided.
    scale: s >= 1, 1 is off. The paper's φ is s − 1.
    tau: τ > 0, the largest growth of a token's norm.
    alpha: α in 0..1, the share of the guided output; 0 is off. On strongly distilled models every
        token is clipped, and only tau and alpha act (the share is logged at level DEBUG).
    norm: "l1", or "l2" as in the authors' first code for Flux.
    negative: the text to guide away from, for all samples; None is the run's negative prompts.
        `sampler.guide` needs it, and the pipeline's own guidance off.
    interval, window: as for `cfg`; outside, the plain attention runs.

    Deviations: z = (1 − α)·z⁺ + α·0 where z⁺ = 0 (the published codes divide 0 by 0).
    """

    rule: Any = field(default="none", metadata={"kind": "guidance"})
    scale: Annotated[float, Ge(1)] = 5.0
    tau: Annotated[float, Gt(0)] = 2.5
    alpha: Annotated[float, Ge(0), Le(1)] = 0.25
    norm: Literal["l1", "l2"] = "l1"
    negative: str | None = None
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models "
        "(Chen et al., 2025), arXiv:2505.21179, algorithm 1"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", build("guidance", self.rule))
        if self.rule.name in ("nag", "forecast", "sum"):
            raise ValueError(f"nag: rule = {self.rule.name!r} cannot be inside; put nag inside it.")

    @property
    def off(self) -> bool:
        """Return True for settings that change nothing."""
        return is_one(self.scale) or is_zero(self.alpha)

    @property
    def needs(self) -> frozenset[str]:
        own: frozenset[str] = (
            frozenset() if self.off or self.negative is not None else frozenset({"uncond"})
        )
        return self.rule.needs | own

    @property
    def graph_refusal(self) -> str:
        """Reason that runs cannot be CUDA graphs."""
        return "the rule 'nag' hooks the network's attention"

    @property
    def sets_direction(self) -> bool:
        """Return True if the inner rule keeps a direction apart from its target."""
        return self.rule.sets_direction

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[NAG, Cond]:
        """The rule inside bound to the run, and the negative prompt encoded.

        Raises ValueError for a sample without a negative prompt, and for a network whose attention
        is not known.
        """
        texts, count = list(context.negative), len(context.prompts)
        if not self.off:
            context.adapter.check_mixed()
            if self.negative is not None:
                own = [self.negative] * count
                encoded = context.adapter.encode([""] * count, own, True, context.size).uncond
                cond = replace(cond, extra={**cond.extra, NEGATIVE: encoded})
            elif not all(text.strip() for text in texts):
                raise ValueError(
                    "nag: give a negative prompt for every image; without one there is nothing to "
                    "go away from."
                )
        if "uncond" not in self.rule.needs:  # the prompts are this rule's own
            context = replace(context, negative=[""] * count)
        rule, cond = self.rule.bind(context, cond)
        return (self if rule is self.rule else replace(self, rule=rule)), cond

    def start(self, cond: Cond) -> Any:
        return self.rule.start(cond)

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        branches = dict(self.rule.plan(x, span, cond, state))
        if self.off or "cond" not in branches or not active(self.interval, self.window, span):
            return branches
        negative = cond.extra.get(NEGATIVE, self.negative or cond.uncond)
        settings = (self.scale, self.tau, self.alpha, self.norm)
        first = span.index == (self.window[0] if self.window else 0)
        mixing = Reported(*settings) if first and log.isEnabledFor(logging.DEBUG) else None
        branches["cond"] = replace(
            branches["cond"],
            negative=negative,
            mixing=mixing or partial(_mixed, settings=settings),
        )
        return branches

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        return self.rule.combine(x, preds, span, state)

    def regime(self, x: Any, span: Span, state: Any) -> dict[str, Any]:
        """The branches of the rule inside, and whether the attention is guided."""
        on = not self.off and active(self.interval, self.window, span)
        return {**regime(self.rule, x, span, state), "nag": on}


def guided(
    positive: Tensor,
    negative: Tensor,
    scale: float = 5.0,
    tau: float = 2.5,
    alpha: float = 0.25,
    norm: str = "l1",
) -> Tensor:
    """z [..., T, C] from the attention outputs z⁺ and z⁻, as `NAG` has it; norms over C.

    float64 in, float64 out; half precision is computed in float32 and rounded at the end.
    """
    import torch

    order = 1 if norm == "l1" else 2
    wide = torch.promote_types(positive.dtype, torch.float32)
    p, n = positive.to(wide), negative.to(wide)
    away = p + (scale - 1) * (p - n)
    most, length = tau * _norm(p, order), _norm(away, order)
    clipped = torch.where(length > most, most / length, torch.ones_like(length))
    return (alpha * clipped * away + (1 - alpha) * p).to(positive.dtype)


def _norm(values: Tensor, order: int) -> Tensor:
    """Norms [..., 1] over the last dimension."""
    return cast(Any, values).norm(order, -1, keepdim=True)


def _mixed(positive: Tensor, negative: Tensor, settings: Any) -> Tensor:
    return guided(positive, negative, *settings)


class Reported:
    """`guided` for one call of a network, which logs the share of clipped tokens at its end."""

    def __init__(self, scale: float, tau: float, alpha: float, norm: str) -> None:
        self.settings = (scale, tau, alpha, norm)
        self.shares: list[Tensor] = []

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        scale, tau, _, norm = self.settings
        order = 1 if norm == "l1" else 2
        away = positive + (scale - 1) * (positive - negative)
        clipped = _norm(away.float(), order) > tau * _norm(positive.float(), order)
        self.shares.append(clipped.float().mean().detach())
        return guided(positive, negative, *self.settings)

    def close(self) -> None:
        """Log the share."""
        share = sum(float(share) for share in self.shares) / max(1, len(self.shares))
        log.debug(
            "nag: %.0f %% of the tokens are clipped at tau = %g", 100 * share, self.settings[1]
        )
