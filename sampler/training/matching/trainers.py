"""DiffusionNFT and advantage-weighted matching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge

from sampler.registry import register
from sampler.registry.constraints import Count, Fraction, Nonnegative, Positive
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch
from sampler.training.matching.base import Matched, MatchingBase, Memory
from sampler.training.settings import Defaults

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.training.session import Session
    from sampler.types import Prediction

_DEFAULTS = Defaults(
    steps=10,
    sampler={"name": "ab", "order": 2},
    lr=3e-4,
    weight_decay=1e-4,
    clip=1.0,
    rank=32,
    alpha=64,
)


def _updates(
    trainer: MatchingBase, session: Session, batch: Batch, state: Any
) -> Iterator[MicroBatchLoss]:
    from sampler.training.matching.update import Matching
    from sampler.training.online import online_updates

    return online_updates(Matching(trainer, session), batch, state)


@register("trainer", "nft")
@dataclass(frozen=True)
class NFT(MatchingBase):
    """DiffusionNFT: forward matching that is pulled to good samples and pushed from bad ones.

        D± = D_old ± beta·(D − D_old),   r = clip(A, ± A_max)/(2·A_max) + 1/2
        loss = A_max/beta·[r·mean((D₊ − x0)²)/n₊ + (1 − r)·mean((D₋ − x0)²)/n₋]
        n± = mean|D± − x0|, without gradient

    D is the estimate of x0 at x = alpha·x0 + sigma·eps, x0 a sample of the old weights, A its
    advantage among the images of its prompt. Black-box rewards, any sampler
    and process, no log-probabilities; the memory is that of one forward pass.

    beta: above 0; 0.1 for several rewards. mode: advantages that count, "all", "positive_only",
        "negative_only", "one_only" (positive ones are 1, others 0) or "binary" (their signs).
    group_size: images per prompt, at least 2. std: deviation that divides the advantages, of the
        "batch", of the "group", or "none". max_advantage: A_max.
    advantages: of several rewards, "sum", of their weighted total; or "gdpo", which normalises each
        part of the reward `sum` in its group before they are weighed and added.
    times: K, noise levels per sample and update. law: of the levels: "grid", the sampler's own;
        "uniform" or "logit_normal" in flow time. shift: of the latter two, above 1 towards noise.
        low, high: range of the levels, as shares of the way from noise to image.
    memory: of the old weights, which sample: "on_policy" (those of the update before), or an
        average that is "slow" (decay 0.001 per step so far, at most 0.5) or "fast" (0 up to step
        75, then 0.0075 more per step, at most 0.999; the authors' for texts in images).
    kl: weight of the mean squared distance to the base model's velocity eps − x0, which is added.
    minibatches: optimiser steps per pass over a batch; passes: number of passes.
    train_rule: "cond", the conditional branch alone, so that guidance moves into the weights; or
        "sampling", the rule of the settings.
    few_step: also train few-step models, which it blurs.

    The metric `gain` is the loss minus that at the old weights: negative while it learns. The loss
    itself does not depend on r there. `flat_groups` is the share of samples in groups of equal
    rewards, which are pulled to the old weights alone.
    """

    memory: Memory = "slow"
    beta: Positive = 1.0
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"

    reference: ClassVar[str] = (
        "DiffusionNFT: Online Diffusion Reinforcement with Forward Process (Zheng et al., 2025), "
        "arXiv:2509.16117, and its published code"
    )
    defaults: ClassVar[Defaults] = _DEFAULTS

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        return _updates(self, session, batch, state)

    def pull(self, new: Prediction, other: Prediction) -> Tensor:
        from sampler.objectives import velocity_distance

        return velocity_distance(new, other)

    def loss(self, matched: Matched, advantage: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        from sampler.objectives import nft_loss, optimality

        r = optimality(advantage, self.max_advantage, self.mode)
        new = nft_loss(matched.new, matched.old, matched.x0, r, self.beta)
        with torch.no_grad():
            old = nft_loss(matched.old, matched.old, matched.x0, r, self.beta)
        return self.max_advantage * new, self.max_advantage * old


@register("trainer", "awm")
@dataclass(frozen=True)
class AWM(MatchingBase):
    """Advantage-weighted matching: PPO's clipped loss on a matching error as log-probability.

        log p = −w(sigma, e),   e = mean((out − out*)²),   rho = exp(log p − log p_old)
        loss = max(−A·rho, −A·clip(rho, 1 − clip_range, 1 + clip_range))

    out is the network's output at x = alpha·x0 + sigma·eps and out* the exact one for a sample x0
    of the old weights; A is its advantage among the images of its prompt, divided by
    `max_advantage`. At the old weights the gradient is that of −A·log p.

    weighting: w, "uniform" e, "t" sigma·e, "t2" sigma²·e, "huber", or "ghuber".
    power: above 0, of "ghuber".
    average: "each" takes one ratio per level, "levels" one of the mean log-ratio over all levels,
        which evaluates them twice where the weights are not the old ones.
    clip_range: above 0; 1 leaves the ratio practically free.
    kl_ema: weight of the mean squared distance to the output of an average of recent weights, of
        decay 0.001 per step so far, at most 0.3.
    kl_law: "uniform", or "elbo", which divides both distances by
        2·0.49·sigma/(1 − min(sigma, 0.99)).

    kl: weight of the mean squared distance to the base model's output, which is added.
    low, high: as in `nft`; by default without the first and the last two of 14 levels, as the
        authors have it. memory: as in `nft`, but "on_policy" by default.

    The other fields are those of `nft`.
    """

    times: Count = 6
    low: Fraction = 0.01  # levels 1 to 11 of 14
    high: Fraction = 0.8
    kl: Nonnegative = 1e-3
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    power: Positive = 0.25
    average: Literal["levels", "each"] = "each"
    clip_range: Positive = 1.0
    kl_ema: Annotated[float, Ge(0), DocInfo("0 is off")] = 1.0
    kl_law: Literal["uniform", "elbo"] = "uniform"

    reference: ClassVar[str] = (
        "Advantage Weighted Matching (Xue et al., 2025), arXiv:2509.25050, and its published code"
    )
    defaults: ClassVar[Defaults] = replace(_DEFAULTS, steps=14)

    @property
    def joint(self) -> bool:
        return self.average == "levels"

    def log_ratio(self, matched: Matched) -> Tensor:
        from sampler.objectives import matching_log_prob

        new, old = (
            matching_log_prob(pred, matched.x0, matched.eps, self.weighting, self.power)
            for pred in (matched.new, matched.old)
        )
        return new - old.detach()

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        return _updates(self, session, batch, state)

    def loss(self, matched: Matched, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clipped loss; with one ratio for all levels the part of this level in it.

        The ratio of all levels is known before their graphs, which are built one at a time: each
        contributes the same value and the gradient rho·grad(log-ratio of the level).
        """
        from sampler.objectives import clipped_loss

        advantage = advantage / self.max_advantage
        ratio = self.log_ratio(matched)
        if matched.joint is not None:
            ratio = matched.joint + (ratio - ratio.detach())
        return clipped_loss(ratio, advantage, self.clip_range), -advantage

    @property
    def recent_kl(self) -> float:
        return self.kl_ema

    @property
    def unused(self) -> dict[str, str]:
        found = super().unused
        if self.weighting != "ghuber":
            found["power"] = f"weighting = {self.weighting!r}"
        if not self.kl and not self.kl_ema:
            found["kl_law"] = "kl = 0 and kl_ema = 0"
        return found

    @property
    def averages(self) -> tuple[str, ...]:
        return (*super().averages, *(("recent",) if self.kl_ema else ()))

    def decays(self, steps: int) -> dict[str, float]:
        recent = {"recent": min(0.001 * steps, 0.3)} if self.kl_ema else {}
        return {**super().decays(steps), **recent}

    def kl_scale(self, sigma: float) -> float:
        if self.kl_law == "uniform":
            return 1.0
        return 1 / (2 * 0.49 * sigma / (1 - min(sigma, 0.99)))
