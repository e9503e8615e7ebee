"""Direct preference optimisation: pairs of images at the same noise, chosen against rejected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sampler.core.noise import Noise
from sampler.objectives import denoising_error, dpo_loss
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch
from sampler.training.matching.base import PairBase
from sampler.training.matching.levels import matching_levels
from sampler.training.matching.pair_files import read_pair
from sampler.training.matching.update import predict_at
from sampler.training.online import collected, cut, gather_rows, sampled, step_losses
from sampler.training.session import Session
from sampler.types import Cond, Guidance, Level


@dataclass(frozen=True)
class Pairs:
    """P pairs of a batch.

    rows: their numbers; x0: clean latents [2·P, ...], each chosen one before its rejected one;
    seeds of their noise; weight [P]: 0 for a pair without preference; cond of the 2·P samples, and
    the rule of the training.
    """

    rows: list[int]
    x0: Tensor
    seeds: tuple[int, ...]
    weight: Tensor
    cond: Cond
    rule: Guidance | None


def pair_updates(
    trainer: PairBase, session: Session, batch: Batch, state: Any
) -> Iterator[MicroBatchLoss]:
    """Read or sample the pairs of a batch, then yield the losses of its optimiser steps.

    The rows of a batch are groups of `images_per_prompt`, and pair n is of group n.
    """
    size, metrics = trainer.images_per_prompt, dict[str, Any]()
    if trainer.data is not None:
        members = partial(_of_files, session, trainer.data, batch)
    else:
        found = collected(session, batch, 1, partial(sampled, session, batch))
        latents = torch.cat([part.x0 for step in found.steps for part in step])
        members = partial(_of_group, gather_rows(session, latents), found.rewards, size)
        metrics = found.metrics
    own = range(batch.rank, len(batch.prompts) // size, batch.world)
    steps = [
        [_pairs(trainer, session, batch, members, rows) for rows in step]
        for step in cut(own, trainer.minibatches, max(1, session.micro // 2))
    ]
    limits = (trainer.shift, trainer.low, trainer.high)
    levels = matching_levels(session, batch, trainer.law, trainer.times, *limits)
    losses = partial(_losses, trainer, session, levels)
    yield from step_losses(batch, trainer.passes, steps, losses, metrics, state)


def _of_files(session: Session, source: str, batch: Batch, row: int) -> tuple[Tensor, float]:
    return read_pair(session, source, batch.prompts[2 * row]), 1.0


def _of_group(latents: Tensor, rewards: list[float], size: int, row: int) -> tuple[Tensor, float]:
    """Return the best and the worst latents of a group; weight 0 where their rewards are equal.

    Images without a reward are left out.
    """
    rows = range(row * size, (row + 1) * size)
    group = [i for i in rows if math.isfinite(rewards[i])] or [rows[0]]
    best, worst = max(group, key=rewards.__getitem__), min(group, key=rewards.__getitem__)
    return latents[[best, worst]], float(rewards[best] > rewards[worst])


@torch.no_grad()
def _pairs(
    trainer: PairBase,
    session: Session,
    batch: Batch,
    members: Callable[[int], tuple[Tensor, float]],
    rows: list[int],
) -> Pairs:
    """Return some pairs of a batch; members: latents [2, ...] and weight of one by its number."""
    size, found = trainer.images_per_prompt, [members(row) for row in rows]
    x0 = torch.cat([latents for latents, _ in found])
    rule, cond = session.encode([batch.prompts[row * size] for row in rows for _ in range(2)])
    return Pairs(
        rows=rows,
        x0=x0,
        seeds=tuple(batch.seeds[row * size] for row in rows),
        weight=torch.tensor([weight for _, weight in found]).to(x0),
        cond=cond,
        rule=rule if trainer.train_rule == "sampling" else None,
    )


def _losses(
    trainer: PairBase, session: Session, levels: Sequence[Level], pairs: Pairs
) -> Iterator[tuple[Tensor | None, dict[str, Any]]]:
    """Yield the losses [P] at each level; pairs without preference have none.

    The base model's errors come first: it must not be put in place between the forward and the
    backward pass of the trained weights.
    """
    weight, flat = pairs.weight, {"flat_groups": 1 - pairs.weight}
    for number, level in enumerate(levels):
        if not bool(weight.any()):
            still = ("margin_chosen", "margin_rejected", "accuracy")
            yield None, {**flat, **{name: torch.zeros_like(weight) for name in still}}
            continue
        with torch.no_grad(), session.reference():
            base = _errors(session, pairs, level, number)
        error = _errors(session, pairs, level, number)
        loss = dpo_loss(error, base, trainer.beta) + trainer.anchor * error[:, 0]
        margin = (base - error).detach() * weight[:, None]
        right = (margin[:, 0] > margin[:, 1]).to(weight)
        yield (
            weight * loss / len(levels),
            {
                **flat,
                "margin_chosen": margin[:, 0],
                "margin_rejected": margin[:, 1],
                "accuracy": right * weight,
            },
        )


def _errors(session: Session, pairs: Pairs, level: Level, number: int) -> Tensor:
    """Return mean squared errors of the network's output [P, 2], both members at the same noise."""
    chosen = pairs.x0[::2]
    eps = Noise(pairs.seeds).draw(number, chosen, "renoise").repeat_interleave(2, 0)
    x = level.alpha * pairs.x0 + level.sigma * eps
    seeds = tuple(seed for seed in pairs.seeds for _ in range(2))
    pred = predict_at(session, pairs.cond, seeds, x, level, pairs.rule)
    return denoising_error(pred, pairs.x0, eps).view(-1, 2)
