"""Ratios, losses and KL of `grpo`, on the trajectories of one batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from sampler.core.step import apply_move
from sampler.core.trajectory import Run, first_noise
from sampler.objectives import (
    clipped_loss,
    dppo_keep,
    gaussian_kl,
    guarded_log_ratio,
    velocity_distance,
)
from sampler.training.batches import Batch
from sampler.training.group_advantages import combined_advantages, flat_rows
from sampler.training.matching.levels import flow_sigma
from sampler.training.online import Round
from sampler.training.policy.base import GroupBase
from sampler.training.policy.rollout import Action, Policy, Trajectory, to_device
from sampler.training.session import Session
from sampler.types import Lin, Move, Prediction, Snapshot, Span, spans


@dataclass(frozen=True)
class Graded:
    """Clipped advantages of the batch [N], 0 in groups of equal rewards."""

    advantage: Tensor


@dataclass(frozen=True)
class GroupPolicy:
    """The part of `grpo` in an update; see `sampler.training.online.OnlineMethod`."""

    trainer: GroupBase
    policy: Policy
    shares: Iterator[int] = field(default_factory=count)  # numbers the terms of the loss

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
        """Sample, score, and keep no latents but those of the actions."""
        run = self.session.begin(batch, rows)
        if self.trainer.same_noise:
            run = self._one_start_per_group(run, batch, rows)
        found = self.policy.rollout(batch, rows, run)
        none = found.x0.new_empty(0)
        bare = run.snapshot._replace(x=none)
        return replace(found, x0=none, final=bare, run=run._replace(snapshot=bare))

    def weigh(self, batch: Batch, found: Round[Any], state: Any) -> tuple[Graded, Any]:
        trainer, reward, limit = self.trainer, self.session.reward, self.trainer.max_advantage
        given = (batch.groups, found.rewards, found.parts)
        flat = torch.tensor(flat_rows(trainer.advantages, reward, *given))
        advantages = combined_advantages(trainer.advantages, trainer.std, reward, *given)
        advantage = torch.from_numpy(advantages).clamp(-limit, limit)
        found.metrics["flat_groups"] = float(flat.double().mean())
        return Graded(advantage.masked_fill(flat, 0.0)), state

    def after(self, state: Any) -> None:
        """Do nothing: the next batch is sampled by the trained weights themselves."""

    def losses(
        self, batch: Batch, collected: Trajectory, weights: Graded
    ) -> Iterator[tuple[Tensor | None, dict[str, Any]]]:
        """Yield the terms of the actions; a micro-batch of flat groups is not evaluated again."""
        run, trainer = collected.run, self.trainer
        advantage = weights.advantage[collected.rows].to(run.snapshot.x)
        for action in collected.actions:
            if not trainer.kl_beta and not bool(advantage.any()):
                still = {"ratio": torch.ones_like(advantage), "clipped": advantage}
                yield None, still
                continue
            loss, metrics = action_loss(trainer, self.policy, run, action, advantage)
            if next(self.shares) == 0:
                metrics["ratio_first"] = self._first_ratio(metrics["ratio"])
            yield loss / len(collected.actions), metrics

    def _one_start_per_group(self, run: Run, batch: Batch, rows: Sequence[int]) -> Run:
        """Replace the initial noise by that of the first sample of each group."""
        session, size = self.session, self.trainer.group_size
        grid = session.pipeline.grid(session.steps, session.size)
        seeds = [batch.seeds[row - row % size] for row in rows]
        x = first_noise(session.pipeline, seeds, grid, session.size)
        own = run.snapshot.seeds
        start, _ = session.engine.start(x, grid, run.cond, run.method, run.rule, own)
        return run._replace(snapshot=start)

    def _first_ratio(self, ratio: Tensor) -> float:
        """Return the largest |rho − 1| before any step; warn where rounding dominates it."""
        found, kind = float((ratio - 1).abs().max()), ratio.device.type
        if found > 1e-3:
            cast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if cast else self.session.pipeline.dtype
            warnings.warn(
                f"grpo: the ratio at unchanged weights is off 1 by {found:.1e} with the network in "
                f"{dtype} and micro-batches of {len(ratio)}; train in float32.",
                stacklevel=2,
            )
        return found


def action_loss(
    trainer: GroupBase, policy: Policy, run: Run, action: Action, advantage: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss of one action per sample [B], and its metrics."""
    device = run.snapshot.x.device
    before, after = to_device(action.before, device), action.after.to(device)
    span = spans(run.levels)[before.index]
    pred, move = _again(policy, run, before, span)
    mean = Lin.of(move.mean).tensor()
    # The same noise again gives `after` bit for bit at unchanged weights, and so a shift of 0.
    shift = apply_move(before, move, before.guidance, before.nfe).x - after
    old_mean = (mean - shift).detach()
    if trainer.ratio == "guard":
        log_ratio = guarded_log_ratio(mean, old_mean, after, move.std)
    else:
        log_ratio = policy.log_prob(move, after) - action.log_prob.to(device)
    ratio = log_ratio.exp()
    if trainer.ratio == "dppo":
        keep = dppo_keep(mean, old_mean, move.std, log_ratio, advantage, trainer.threshold)
        loss, clipped = -advantage * ratio * keep, ~keep
    else:
        loss = clipped_loss(log_ratio, advantage, trainer.clip_range)
        clipped = (ratio - 1).abs() > trainer.clip_range
    if trainer.reweigh:
        loss = loss / (flow_sigma(span.now) - flow_sigma(span.next))
    metrics: dict[str, Any] = {"ratio": ratio.detach(), "clipped": clipped.float()}
    if trainer.kl_beta:
        kl = _kl(trainer, policy, run, before, span, pred, move)
        loss = loss + trainer.kl_beta * kl
        metrics["kl"] = kl.detach()
    return loss, metrics


def _again(policy: Policy, run: Run, before: Snapshot, span: Span) -> tuple[Prediction, Move]:
    """Recompute a step with the present weights: its prediction and the sampler's move."""
    session = policy.session
    pred = session.engine.predict(before, span, run.cond, run.rule)[0]
    return pred, session.method.step(before.x, pred, span, before.sampler)


def _kl(
    trainer: GroupBase,
    policy: Policy,
    run: Run,
    before: Snapshot,
    span: Span,
    pred: Prediction,
    move: Move,
) -> Tensor:
    """Distance [B] to the base model, as `kl_space` says."""
    with torch.no_grad(), policy.session.reference():
        base_pred, base_move = _again(policy, run, before, span)
        base_mean = Lin.of(base_move.mean).tensor()
    if trainer.kl_space == "v":
        return velocity_distance(pred, base_pred)
    return gaussian_kl(Lin.of(move.mean).tensor(), base_mean, move.std)
