"""Flow-GRPO: policy gradients on stochastic steps of a flow model, with group advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.registry import register
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch
from sampler.training.policy.base import GroupBase
from sampler.training.policy.window import NoiseWindow
from sampler.training.settings import Defaults

if TYPE_CHECKING:
    from sampler.training.session import Session


@register("trainer", "grpo")
@dataclass(frozen=True)
class GRPO(GroupBase):
    """Flow-GRPO: policy gradients on a few stochastic steps of a flow model, for any reward.

        rho = exp(log pi_theta(x'|x) − log pi_old(x'|x)),   A = (r − mean_group)/(std + 1e-4)
        loss = max(−A·rho, −A·clip(rho, 1 − clip_range, 1 + clip_range)) + kl_beta·KL

    pi is the sampler's move N(mean, s²·I), its log-probability the mean over the elements of a
    latent. Groups are the images of a prompt. Any sampler with noise: "cps" by default, which
    leaves none in the image; any process.

    ratio: "plain", as above. "guard" is GRPO-Guard, log rho = mean(z·(mean − mean_old)), z the
        noise that was drawn: without the bias −mean((mean − mean_old)²)/(2·s²) of the plain one.
        "dppo" leaves the ratio free and drops a sample whose KL to the old policy has reached
        `threshold` while its ratio moves on in the direction of its advantage.
    clip_range: above 0, of "plain" and "guard". threshold: above 0, of "dppo".
    reweigh: divide the loss of "guard" by |dt|, the step in flow time, as its authors do.
    window: {size, every, strategy, stride, decay, within, roll_back}: the steps that draw noise,
        `size` of them, moved by `stride` every `every` updates ("progressive"; "decay" and
        "exp_decay" move ever faster, "random" at every update) within that share of the run,
        again from its start where `roll_back`. Other steps follow the deterministic sampler and
        are not trained. None: all steps in which the sampler draws noise.
    group_size: images per prompt, at least 2. std: deviation that divides the advantages, of the
        "batch", of the "group", or "none". max_advantage: advantages are clipped to ± this.
    advantages: of several rewards, "sum", of their weighted total; or "gdpo", which normalises each
        part of the reward `sum` in its group before they are weighed and added.
    same_noise: one initial noise for all images of a prompt.
    minibatches: optimiser steps per pass over a batch; passes: number of passes. At 1 and 1 the
        ratio is 1 and nothing is clipped.
    kl_beta: weight of the KL to the base model. kl_space: "x", mean((mean − mean_base)²)/(2·s²)
        (published code leaves |dt| out of s²: its weight is larger by 1/|dt|), or "v",
        mean((v − v_base)²), v = eps − x0.
    offload: keep stored trajectories on the CPU. select, keep, prompts: as in `ddpo`.

    Metrics: `ratio_first`, the largest |rho − 1| of the first share, which is 0 in float32;
    `flat_groups`, the share of samples in groups of equal rewards, which have no gradient.
    """

    window: dict[str, Any] | None = field(default_factory=lambda: asdict(NoiseWindow()))

    stochastic_sampler: ClassVar[str] = "cps, flow_sde, dance_sde, or ddim with eta > 0"
    reference: ClassVar[str] = (
        "Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025), "
        "arXiv:2505.05470, section 4; window: MixGRPO (Li et al., 2025), arXiv:2507.21802; guard: "
        "GRPO-Guard (Wang et al., 2025), arXiv:2510.22319"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=10,
        sampler="cps",
        lr=3e-4,
        weight_decay=1e-4,
        clip=1.0,
        rank=32,
        alpha=64,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            object.__setattr__(self, "window", asdict(NoiseWindow.of(self.window)))

    def check(self, session: Session) -> None:
        super().check(session)
        if self.window is not None:
            NoiseWindow.of(self.window).check(session)

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        from sampler.training.policy.choosing import policy_updates
        from sampler.training.policy.group import GroupPolicy
        from sampler.training.policy.rollout import Policy

        if self.window is not None:
            session = NoiseWindow.of(self.window).applied(session, batch.update)
        method = GroupPolicy(self, Policy(self, session))
        return policy_updates(self, method, batch, state)
