"""The clipped likelihood ratio, on the trajectories of one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sampler_kernels import gram, settle
from torch import Tensor

from sampler.core.loop import apply_move
from sampler.core.trajectory import Run
from sampler.training.base import Update
from sampler.training.batches import Batch, parts
from sampler.training.policy.advantages import per_group, per_prompt
from sampler.training.policy.rollout import Action, Policy, Trajectory, moved, taken
from sampler.types import Lin, Move, Span, spans

if TYPE_CHECKING:
    from sampler.training.session import Session


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """max(−A·rho, −A·clip(rho, 1 − clip_range, 1 + clip_range)), elementwise."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def policy_updates(policy: Policy, batch: Batch, state: Any) -> Iterator[Update]:
    """Collects a batch, scores it, then steps on its clipped ratios; `state` has the buffers."""
    trainer, session = policy.trainer, policy.session
    with torch.no_grad():
        found = [policy.rollout(batch, rows) for rows in parts(batch.rows, session.micro)]
    reward = torch.cat([trajectory.reward for trajectory in found])
    rewards = gathered(session, reward)
    if trainer.advantage == "group":
        advantages, inverse, state = per_group(batch.prompts, rewards)
    else:
        advantages, inverse, state = per_prompt(
            batch.prompts, rewards, state, trainer.buffer, trainer.min_count
        )
    weights = _Weights(
        torch.tensor(advantages, dtype=torch.float64).clamp(
            -trainer.max_advantage, trainer.max_advantage
        ),
        torch.tensor(inverse, dtype=torch.float64),
    )
    metrics = {"reward": reward, "nfe": sum(trajectory.nfe for trajectory in found)}
    for turn in range(trainer.passes):
        order = list(range(len(batch.prompts)))
        batch.random(f"pass {turn}").shuffle(order)
        for chosen in parts(order, -(-len(order) // trainer.minibatches)):
            yield from _minibatch(policy, batch, found, set(chosen), weights)
            yield Update(None, metrics, step=True, state=state)
            metrics = {}


def gathered(session: Session, values: Tensor) -> list[float]:
    """The values of all rows in the order of their numbers, from those of this process."""
    every = session.gather(values.detach().double())
    world = len(every) // len(values)
    return every.view(world, -1).T.flatten().tolist()


@dataclass(frozen=True)
class _Weights:
    """Per row of the batch: the advantage, clipped, and 1/std of the rewards behind it."""

    advantage: Tensor
    inverse: Tensor


def _minibatch(
    policy: Policy, batch: Batch, found: list[Trajectory], chosen: set[int], weights: _Weights
) -> Iterator[Update]:
    """The shares of one optimiser step: one per micro-batch and action."""
    for trajectory in found:
        mine = [i for i, row in enumerate(trajectory.rows) if row in chosen]
        if not mine:
            continue
        rows, count = [trajectory.rows[i] for i in mine], len(trajectory.rows)
        whole = len(mine) == count
        run = trajectory.run if whole else policy.session.begin(batch, rows)
        index = torch.tensor(mine)
        for action in trajectory.actions:
            if not whole:
                before = taken(action.before, index, count)
                after, log_prob = taken((action.after, action.log_prob), index, count)
                action = Action(before, after, log_prob)
            loss, metrics = _share(policy, run, action, weights.advantage[rows])
            yield Update(loss.sum() / (len(trajectory.actions) * len(chosen)), metrics)
        if policy.final_step == "pathwise":
            loss = _pathwise(policy, batch, run, trajectory, index, weights.inverse[rows])
            yield Update(loss.sum() / len(chosen))


def _share(
    policy: Policy, run: Run, action: Action, advantage: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one action per row [B], and what to log of it."""
    trainer, device = policy.trainer, run.snapshot.x.device
    before, after = moved(action.before, device), action.after.to(device)
    span = spans(run.levels)[before.index]
    move = policy.action(policy.move(run, before, span)[0], span)
    assert move is not None
    log_ratio = policy.log_prob(move, after) - action.log_prob
    loss = clipped_loss(log_ratio, advantage.to(log_ratio), trainer.clip_range)
    ratio = log_ratio.detach().exp()
    metrics = {"ratio": ratio, "clipped": ((ratio - 1).abs() > trainer.clip_range).float()}
    if trainer.kl_beta:
        kl = _kl(policy, run, before, span, move)
        loss = loss + trainer.kl_beta * kl
        metrics["kl"] = kl.detach()
    return loss, metrics


def _kl(policy: Policy, run: Run, before: Any, span: Span, move: Move) -> Tensor:
    """KL [B] to the policy without adapter: ||mean − mean_base||² / (2 std²), one std for both."""
    with torch.no_grad(), policy.session.reference():
        base = policy.action(policy.move(run, before, span)[0], span)
        assert base is not None
        mean = Lin.of(base.mean).tensor()
    square = gram((Lin.of(move.mean) - mean) / move.std)[0, 0]
    return 0.5 * square / policy.share_of(mean)


def _pathwise(
    policy: Policy, batch: Batch, run: Run, trajectory: Trajectory, index: Tensor, inverse: Tensor
) -> Tensor:
    """−r(decode f(x_{T−1})) per row at fixed x_{T−1}, in the units of the score terms.

    Those are divided by the rewards' std, the number of actions, and the elements ("mean").
    """
    final = taken(trajectory.final, index, len(trajectory.rows))
    span = spans(run.levels)[final.index]
    move, state, nfe = policy.move(run, final, span)
    last = apply_move(final, move, state, nfe)
    x = settle(policy.session.method.finish(last.x, last.sampler))
    prompts = [batch.prompts[trajectory.rows[i]] for i in index.tolist()]
    scores = policy.session.scores(policy.session.decoder("hard")(x), prompts)
    units = policy.share_of(x) * max(1, len(trajectory.actions))
    return -scores * inverse.to(scores) / units
