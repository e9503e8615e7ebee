"""The clipped likelihood ratio of PPO, on the trajectories of one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sampler_kernels import gram, settle
from torch import Tensor

from sampler.core.errors import SamplerError
from sampler.core.loop import apply_move
from sampler.core.trajectory import Run
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, micro_batches
from sampler.training.policy.advantages import per_group, per_prompt
from sampler.training.policy.rollout import Action, Policy, Trajectory, select, to_device
from sampler.training.session import Session
from sampler.types import Lin, Move, Snapshot, Span, spans


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Return max(−A·rho, −A·clip(rho, 1 − clip_range, 1 + clip_range)), elementwise."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def policy_updates(policy: Policy, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
    """Collect and score a batch, then step on its clipped ratios; `state` has the buffers."""
    trainer, session = policy.trainer, policy.session
    with torch.no_grad():
        parts = micro_batches(batch.rows, session.micro)
        trajectories = [policy.rollout(batch, rows) for rows in parts]
    reward = torch.cat([trajectory.reward for trajectory in trajectories])
    rewards = gather_rewards(session, reward)
    if trainer.advantage == "group":
        advantages, inverse, state = per_group(batch.prompts, rewards)
    else:
        advantages, inverse, state = per_prompt(
            batch.prompts, rewards, state, trainer.buffer, trainer.min_count
        )
    limit = trainer.max_advantage
    weights = _Weights(
        torch.tensor(advantages, dtype=torch.float64).clamp(-limit, limit),
        torch.tensor(inverse, dtype=torch.float64),
    )
    metrics: dict[str, Any] = {
        "reward": reward,
        "nfe": sum(trajectory.nfe for trajectory in trajectories),
        **{
            f"reward_{name}": torch.cat([trajectory.parts[name] for trajectory in trajectories])
            for name in trajectories[0].parts
        },
    }
    for number in range(trainer.passes):
        order = list(range(len(batch.prompts)))
        batch.random(f"pass {number}").shuffle(order)
        for chosen in micro_batches(order, -(-len(order) // trainer.minibatches)):
            yield from _minibatch(policy, batch, trajectories, set(chosen), weights)
            yield MicroBatchLoss(None, metrics, step=True, state=state)
            metrics = {}


def gather_rewards(session: Session, values: Tensor) -> list[float]:
    """Return the values of all samples in the order of their numbers."""
    every = session.gather(values.detach().double())
    world = len(every) // len(values)
    return every.view(world, -1).T.flatten().tolist()


@dataclass(frozen=True)
class _Weights:
    """Per sample of the batch: the clipped advantage, and 1/std of the rewards behind it."""

    advantage: Tensor
    inverse: Tensor


def _minibatch(
    policy: Policy,
    batch: Batch,
    trajectories: list[Trajectory],
    chosen: set[int],
    weights: _Weights,
) -> Iterator[MicroBatchLoss]:
    """Yield the losses of one optimiser step: one per micro-batch and action."""
    for trajectory in trajectories:
        own = [i for i, row in enumerate(trajectory.rows) if row in chosen]
        if not own:
            continue
        rows, count = [trajectory.rows[i] for i in own], len(trajectory.rows)
        complete = len(own) == count
        run = trajectory.run if complete else policy.session.begin(batch, rows)
        index = torch.tensor(own)
        for action in trajectory.actions:
            if not complete:
                before = select(action.before, index, count)
                after, log_prob = select((action.after, action.log_prob), index, count)
                action = Action(before, after, log_prob)
            loss, metrics = _action_loss(policy, run, action, weights.advantage[rows])
            yield MicroBatchLoss(loss.sum() / (len(trajectory.actions) * len(chosen)), metrics)
        if policy.final_step == "pathwise":
            loss = _pathwise_loss(policy, batch, run, trajectory, index, weights.inverse[rows])
            yield MicroBatchLoss(loss.sum() / len(chosen))


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


def _pathwise_loss(
    policy: Policy, batch: Batch, run: Run, trajectory: Trajectory, index: Tensor, inverse: Tensor
) -> Tensor:
    """−r(decode f(x_{T−1})) per sample at fixed x_{T−1}, in the units of the score terms.

    Those are divided by the rewards' std, the number of actions, and the elements ("mean").
    """
    final = select(trajectory.final, index, len(trajectory.rows))
    span = spans(run.levels)[final.index]
    move, state, nfe = policy.move(run, final, span)
    last = apply_move(final, move, state, nfe)
    x = settle(policy.session.method.finish(last.x, last.sampler))
    prompts = [batch.prompts[trajectory.rows[i]] for i in index.tolist()]
    scores = policy.session.scores(policy.session.decoder("hard")(x), prompts).total
    units = policy.divisor(x) * max(1, len(trajectory.actions))
    return -scores * inverse.to(scores) / units
