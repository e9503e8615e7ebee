"""DDPO and RLCM: policy gradients on ancestral sampling, and on few-step consistency sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.registry import register
from sampler.registry.constraints import Positive
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch
from sampler.training.policy.base import FinalStep, PPOBase
from sampler.training.settings import Defaults

if TYPE_CHECKING:
    from sampler.training.session import Session


@register("trainer", "ddpo")
@dataclass(frozen=True)
class DDPO(PPOBase):
    """Denoising diffusion policy optimisation: PPO on ancestral sampling, for any reward.

        rho = exp(log pi_theta(x_{i+1}|x_i) − log pi_old(x_{i+1}|x_i)),   A = (r − mean r)/std r
        minimise mean max(−A·rho, −A·clip(rho, 1 − clip_range, 1 + clip_range)) + kl_beta·KL

    The actions are the sampler's moves with std > 0, so it must be stochastic: "ddim" with eta > 0
    by default, others are refused. All steps of a minibatch are accumulated into one optimiser
    step, so their order does not matter (the published code shuffles them per sample).

    clip_range: above 0; 1e-4 belongs to reduction "mean". max_advantage: above 0; advantages are
        clipped to ± this.
    reduction: "mean" divides log-probabilities and KL by the number of elements of a latent, as
        published code does; "sum" does not.
    advantage: "per_prompt" (a ring buffer of `buffer` rewards per prompt, used once it has
        `min_count`), or "group" (the images of a prompt in this batch; group_size >= 2).
    buffer: rewards kept per prompt, at least `min_count`. min_count: number of rewards of a prompt
        from which its own mean and deviation are used instead of those of the batch.
    group_size: images per prompt. minibatches: optimiser steps per pass over a batch; passes:
        number of passes. kl_beta: at least 0, weight of KL to the adapter-off policy.
    offload: keep stored trajectories on the CPU.
    select: images of a prompt that are trained on, "all", or "spread" (D3S): the `keep` of
        group_size whose advantages have the greatest variance; groups of equal rewards are left
        out. keep: at least 2; None grows from half of the group to all of it over the run.
    prompts: "order" takes all in turn; "vade" takes those whose rewards are least certain to be
        above the median of recent ones (Thompson sampling of Beta posteriors).
    """

    stochastic_sampler: ClassVar[str] = "ddim with eta > 0"
    reference: ClassVar[str] = (
        "Training Diffusion Models with Reinforcement Learning (Black et al., 2023), "
        "arXiv:2305.13301, section 4.3; clipping: PPO (Schulman et al., 2017), arXiv:1707.06347, "
        "eq. 7; select: D3S (Wang et al., 2025), arXiv:2509.22115; prompts: VADE (Hu et al., "
        "2025), arXiv:2511.18902"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=50,
        sampler={"name": "ddim", "eta": 1.0},
        lr=3e-4,
        weight_decay=1e-4,
        clip=1.0,
        rank=4,
        alpha=4,
    )

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        from sampler.training.policy.choosing import policy_updates
        from sampler.training.policy.ppo import PPO
        from sampler.training.policy.rollout import Policy

        return policy_updates(self, PPO(self, Policy(self, session)), batch, state)


@register("trainer", "rlcm")
@dataclass(frozen=True)
class RLCM(PPOBase):
    """Reinforcement learning of consistency models: PPO on few-step consistency sampling.

        mean_i = alpha_{i+1}·f(x_i),   std_i = sigma_{i+1},   f the consistency map

    with the loss of `ddpo`. T network calls give T − 1 actions; the image is f(x_{T−1}), without
    noise.

    final_step: treatment of that last map. "drop" (default) treats it as part of the
        environment: the gradient through it is left out. "pathwise" adds −grad r(decode f(x_{T−1}))
        at fixed x_{T−1}, which makes the estimator unbiased; needs a differentiable reward.
        "explore" adds noise of explore_std to f, rewards that image and counts the noise as an
        action: unbiased for the smoothed objective, any reward, works at T = 1.
    explore_std: above 0, in units of the latents.

    The other fields are those of `ddpo`.
    """

    final_step: FinalStep = "drop"
    explore_std: Positive = 0.1

    stochastic_sampler: ClassVar[str] = "consistency"
    reference: ClassVar[str] = (
        "RL for Consistency Models (Oertell et al., 2024), arXiv:2404.03673, section 4"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=8,
        sampler="consistency",
        lr=1e-4,
        weight_decay=0.0,
        clip=5.0,
        rank=8,
        alpha=8,
        lr_end=2 / 3,
    )

    @property
    def needs_actions(self) -> bool:
        return self.final_step == "drop"

    @property
    def unused(self) -> dict[str, str]:
        explores, setting = self.final_step == "explore", f"final_step = {self.final_step!r}"
        return {**super().unused, **({} if explores else {"explore_std": setting})}

    @property
    def differentiates_decoder(self) -> bool:
        return self.final_step == "pathwise"

    def check(self, session: Session) -> None:
        super().check(session)
        reward = session.reward
        if self.final_step == "pathwise" and reward is not None and not reward.differentiable:
            raise ValueError(
                f"rlcm: final_step = 'pathwise' needs a differentiable reward; {reward.name!r} is "
                "not: use 'drop' or 'explore'."
            )

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        from sampler.training.policy.choosing import policy_updates
        from sampler.training.policy.ppo import PPO
        from sampler.training.policy.rollout import Policy

        policy = Policy(self, session, self.final_step, self.explore_std)
        return policy_updates(self, PPO(self, policy), batch, state)
