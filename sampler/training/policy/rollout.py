"""Trajectories of a stochastic sampler, and the log-probabilities of their actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sampler_kernels import map_tree, settle
from torch import Tensor

from sampler.core.noise import Noise
from sampler.core.step import apply_move
from sampler.core.trajectory import Run
from sampler.training.batches import Batch
from sampler.training.online import Collected
from sampler.training.policy.base import FinalStep, PolicyBase
from sampler.training.session import Session
from sampler.types import Lin, Move, Snapshot, Span, spans


@dataclass(frozen=True)
class Action:
    """One stochastic move of B samples, from `before` to x = `after`, with log pi_old [B]."""

    before: Snapshot
    after: Tensor
    log_prob: Tensor


@dataclass(frozen=True, kw_only=True)
class Trajectory(Collected):
    """Images with the actions that led to them, and the snapshot before the last map."""

    actions: list[Action]
    final: Snapshot


@dataclass(frozen=True)
class Policy:
    """A sampler as a Gaussian policy; `final_step` and `explore_std` as in the trainer RLCM."""

    trainer: PolicyBase
    session: Session
    final_step: FinalStep = "drop"
    explore_std: float = 0.0

    def rollout(self, batch: Batch, rows: Sequence[int], run: Run | None = None) -> Trajectory:
        """Sample some images of a batch and score them; called under no_grad.

        run: their start, where it is not that of the session.
        """
        run = run or self.session.begin(batch, rows)
        snapshot, actions = run.snapshot, []
        kept = None  # the end of the action before, as it is stored: it starts this one
        final, image = snapshot, snapshot.x
        for span in spans(run.levels):
            move, state, nfe = self.move(run, snapshot, span)
            following = apply_move(snapshot, move, state, nfe)
            action = self.action(move, span)
            final = snapshot
            image = settle(self.session.method.finish(following.x, following.sampler))
            if action is None:
                kept = None
            else:
                after = following.x if action is move else self._noised(run, action, span)
                image = after if self.final_step == "explore" and action is not move else image
                log_prob = self.log_prob(action, after)
                where = "cpu" if self.trainer.offload else after.device
                before = snapshot if kept is None else snapshot._replace(x=kept)
                kept = to_device(after, where)
                actions.append(Action(to_device(before, where), kept, log_prob))
            snapshot = following
        images = self.session.decoder("hard")(image)
        reward, parts = self.session.score(images, [batch.prompts[row] for row in rows])
        return Trajectory(
            rows=list(rows),
            run=run,
            x0=image,
            reward=reward,
            parts=parts,
            nfe=sum(snapshot.nfe),
            actions=actions,
            final=final,
        )

    def move(self, run: Run, snapshot: Snapshot, span: Span) -> tuple[Move, Any, tuple[int, ...]]:
        """Return the sampler's move from a snapshot, the rule's next state, and the NFE so far."""
        pred, state, nfe = self.session.engine.predict(snapshot, span, run.cond, run.rule)
        return self.session.method.step(snapshot.x, pred, span, snapshot.sampler), state, nfe

    def action(self, move: Move, span: Span) -> Move | None:
        """Return the move as an action, or None where it draws no noise."""
        if not isinstance(move.std, (int, float)) or move.std != 0:
            return move
        if span.index == span.total - 1 and self.final_step == "explore":
            return Move(move.mean, self.explore_std)
        return None

    def log_prob(self, action: Move, after: Tensor) -> Tensor:
        """Return log pi [B], float32 (float64 for float64 states), reduced as the trainer says."""
        with torch.autocast(after.device.type, enabled=False):
            value = action.log_prob(after)
        return value / self.divisor(after)

    def divisor(self, x: Tensor) -> int:
        """Return the divisor of log-probabilities: the elements of a sample, or 1."""
        return x[0].numel() if self.trainer.by_mean else 1

    def _noised(self, run: Run, action: Move, span: Span) -> Tensor:
        """Draw the noise of an action whose move has none."""
        mean = Lin.of(action.mean).tensor()
        noise = Noise(run.snapshot.seeds).draw(span.index, mean, "reward")
        return mean + action.std * noise


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Move the tensors of a tree to a device."""
    return map_tree(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
