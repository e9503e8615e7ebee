"""Trajectories of a stochastic sampler, and the log-probabilities of their actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sampler_kernels import map_tree, settle
from torch import Tensor

from sampler.core.loop import apply_move
from sampler.core.noise import Noise
from sampler.core.trajectory import Run
from sampler.training.batches import Batch
from sampler.training.policy.base import FinalStep, PolicyBase
from sampler.training.session import Session
from sampler.types import Lin, Move, Snapshot, Span, spans


@dataclass(frozen=True)
class Action:
    """One stochastic move of B rows: from `before` to x = `after`, log pi_old [B]."""

    before: Snapshot
    after: Tensor
    log_prob: Tensor


@dataclass(frozen=True)
class Trajectory:
    """B rows sampled: their numbers, conditions, actions, the state before the last map, scores."""

    rows: list[int]
    run: Run
    actions: list[Action]
    final: Snapshot
    reward: Tensor
    nfe: int


@dataclass(frozen=True)
class Policy:
    """A sampler as a Gaussian policy; `final_step` and `explore_std` as in the trainer RLCM."""

    trainer: PolicyBase
    session: Session
    final_step: FinalStep = "drop"
    explore_std: float = 0.0

    def rollout(self, batch: Batch, rows: Sequence[int]) -> Trajectory:
        """Samples some rows and scores them; called without grad."""
        run = self.session.begin(batch, rows)
        snapshot, actions, todo = run.snapshot, [], spans(run.levels)
        final, image = snapshot, snapshot.x
        for span in todo:
            move, state, nfe = self.move(run, snapshot, span)
            following = apply_move(snapshot, move, state, nfe)
            action = self.action(move, span)
            final = snapshot
            image = settle(self.session.method.finish(following.x, following.sampler))
            if action is not None:
                after = following.x if action is move else self._noised(run, action, span)
                image = after if self.final_step == "explore" and action is not move else image
                log_prob = self.log_prob(action, after)
                where = "cpu" if self.trainer.offload else after.device
                actions.append(Action(moved(snapshot, where), after.to(where), log_prob))
            snapshot = following
        images = self.session.decoder("hard")(image)
        reward = self.session.score(images, [batch.prompts[row] for row in rows])
        return Trajectory(list(rows), run, actions, final, reward.detach(), sum(snapshot.nfe))

    def move(self, run: Run, snapshot: Snapshot, span: Span) -> tuple[Move, Any, tuple[int, ...]]:
        """The sampler's move from a snapshot, the rule's next state, the rows evaluated."""
        pred, state, nfe = self.session.engine.predict(snapshot, span, run.cond, run.rule)
        return self.session.method.step(snapshot.x, pred, span, snapshot.sampler), state, nfe

    def action(self, move: Move, span: Span) -> Move | None:
        """The move as an action; None for one without noise that is not made one."""
        if not isinstance(move.std, (int, float)) or move.std != 0:
            return move
        if span.index == span.total - 1 and self.final_step == "explore":
            return Move(move.mean, self.explore_std)
        if span.index == span.total - 1 and self.final_step == "released":
            return Move(span.now.alpha * Lin.of(move.mean), span.now.sigma)
        return None

    def log_prob(self, action: Move, after: Tensor) -> Tensor:
        """log pi [B], float32 (float64 for float64 states), reduced as the trainer says."""
        with torch.autocast(after.device.type, enabled=False):
            value = action.log_prob(after)
        return value / self.share_of(after)

    def share_of(self, x: Tensor) -> int:
        """What log-probabilities are divided by: the elements of a row, or 1."""
        return x[0].numel() if self.trainer.reduction == "mean" else 1

    def _noised(self, run: Run, action: Move, span: Span) -> Tensor:
        """Where an action goes that was made of a move without noise."""
        mean = Lin.of(action.mean).tensor()
        noise = Noise(run.snapshot.seeds).draw(span.index, mean, "reward")
        return mean + action.std * noise


def taken(tree: Any, index: Tensor, rows: int) -> Any:
    """Some rows of every tensor [B, ...], and of every tuple of B numbers, of a tree."""

    def take(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows
        return leaf[index.to(leaf.device)] if batched else leaf

    picked = map_tree(take, tree)
    if isinstance(tree, Snapshot):
        seeds, nfe = ([v[i] for i in index.tolist()] for v in (tree.seeds, tree.nfe))
        return picked._replace(seeds=tuple(seeds), nfe=tuple(nfe))
    return picked


def moved(tree: Any, device: Any) -> Any:
    """A tree with its tensors on a device."""
    return map_tree(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
