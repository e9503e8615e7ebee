"""The clipped likelihood ratio of PPO, on the trajectories of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sampler_kernels import gram, settle
from torch import Tensor

from sampler.core.errors import SamplerError
from sampler.core.step import apply_move
from sampler.core.trajectory import Run
from sampler.objectives import clipped_loss
from sampler.training.batches import Batch
from sampler.training.online import Round
from sampler.training.policy.advantages import per_group, per_prompt
from sampler.training.policy.base import PPOBase
from sampler.training.policy.rollout import Action, Policy, Trajectory, to_device
from sampler.training.session import Session
from sampler.types import Lin, Move, Snapshot, Span, spans


@dataclass(frozen=True)
class Weights:
    """Per sample of the batch: the clipped advantage, and 1/std of the rewards behind it."""

    advantage: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class PPO:
    """A policy-gradient trainer's part in an update; see `sampler.training.online.OnlineMethod`."""

    trainer: PPOBase
    policy: Policy

    @property
    def session(self) -> Session:
        return self.policy.session

    @property
    def passes(self) -> int:
        return self.trainer.passes

    @property
    def steps(self) -> int:
        return self.trainer.minibatches

    def collect(self, batch: Batch, rows: Sequence[int]) -> Trajectory:
        return self.policy.rollout(batch, rows)

    def weigh(self, batch: Batch, found: Round[Any], state: Any) -> tuple[Weights, Any]:
        trainer, rewards, groups = self.trainer, found.rewards, batch.groups
        if trainer.advantage == "group":
            advantages, inverse, state = per_group(groups, rewards)
        else:
            advantages, inverse, state = per_prompt(
                groups, rewards, state, trainer.buffer, trainer.min_count
            )
        limit, double = trainer.max_advantage, torch.float64
        advantage = torch.tensor(advantages, dtype=double).clamp(-limit, limit)
        return Weights(advantage, torch.tensor(inverse, dtype=double)), state

    def losses(
        self, batch: Batch, collected: Trajectory, weights: Weights
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        run, advantage = collected.run, weights.advantage[collected.rows]
        for action in collected.actions:
            loss, metrics = _action_loss(self.policy, run, action, advantage)
            yield loss / len(collected.actions), metrics
        if self.policy.final_step == "pathwise":
            yield _pathwise_loss(self.policy, batch, collected, weights.inverse), {}

    def after(self, state: Any) -> None:
        """Do nothing: the next batch is sampled by the trained weights themselves."""


def _action_loss(
    policy: Policy, run: Run, action: Action, advantage: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one action per sample [B], and its metrics."""
    trainer, device = policy.trainer, run.snapshot.x.device
    before, after = to_device(action.before, device), action.after.to(device)
    span = spans(run.levels)[before.index]
    move = _action_again(policy, run, before, span)
    log_ratio = policy.log_prob(move, after) - action.log_prob
    loss = clipped_loss(log_ratio, advantage.to(log_ratio), trainer.clip_range)
    ratio = log_ratio.detach().exp()
    metrics = {"ratio": ratio, "clipped": ((ratio - 1).abs() > trainer.clip_range).float()}
    if trainer.kl_beta:
        kl = _kl(policy, run, before, span, move)
        loss = loss + trainer.kl_beta * kl
        metrics["kl"] = kl.detach()
    return loss, metrics


def _action_again(policy: Policy, run: Run, before: Snapshot, span: Span) -> Move:
    """Recompute an action of a trajectory with the present weights."""
    action = policy.action(policy.move(run, before, span)[0], span)
    if action is None:
        raise SamplerError(f"Step {span.index} drew noise in the roll-out and draws none now.")
    return action


def _kl(policy: Policy, run: Run, before: Snapshot, span: Span, move: Move) -> Tensor:
    """KL [B] to the policy without LoRA: ||mean − mean_base||² / (2 std²), equal std."""
    with torch.no_grad(), policy.session.reference():
        mean = Lin.of(_action_again(policy, run, before, span).mean).tensor()
    square = gram((Lin.of(move.mean) - mean) / move.std)[0, 0]
    return 0.5 * square / policy.divisor(mean)


def _pathwise_loss(policy: Policy, batch: Batch, trajectory: Trajectory, inverse: Tensor) -> Tensor:
    """−r(decode f(x_{T−1})) per sample at fixed x_{T−1}, in the units of the score terms.

    Those are divided by the rewards' std, the number of actions, and the elements ("mean").
    """
    final = to_device(trajectory.final, trajectory.run.snapshot.x.device)
    span = spans(trajectory.run.levels)[final.index]
    move, state, nfe = policy.move(trajectory.run, final, span)
    last = apply_move(final, move, state, nfe)
    x = settle(policy.session.method.finish(last.x, last.sampler))
    prompts = [batch.prompts[row] for row in trajectory.rows]
    scores = policy.session.scores(policy.session.decoder("hard")(x), prompts).total
    units = policy.divisor(x) * max(1, len(trajectory.actions))
    return -scores * inverse[trajectory.rows].to(scores) / units
