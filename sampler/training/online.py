"""One update of an online trainer: collect samples, score them, weigh, step.

The micro-batches that are trained are those that were collected, with the same samples in the same
order, so that at unchanged weights a network gives the same numbers bit for bit. Optimiser steps
take whole micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sampler.core.trajectory import Run
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, micro_batches, split
from sampler.training.session import Session


@dataclass(frozen=True, kw_only=True)
class Collected:
    """B images of a batch.

    rows: their numbers; run: their start, with conditions and rule; x0: clean latents [B, ...];
    reward [B], and parts, the scores of the parts of a composite reward; nfe: of all together.
    """

    rows: list[int]
    run: Run
    x0: Tensor
    reward: Tensor
    parts: dict[str, Tensor]
    nfe: int


class Part(Protocol):
    """A micro-batch; `rows` are the numbers of what its loss counts."""

    @property
    def rows(self) -> Sequence[int]: ...


C = TypeVar("C", bound=Collected)
P = TypeVar("P", bound=Part)


class OnlineMethod(Protocol, Generic[C]):
    """A trainer's part of an update.

    collect: samples and scores images, called without gradient. weigh: from the rewards of all
    samples, what the losses need of them, and the trainer's next state. losses: the
    terms of the loss of each sample [B], None where nothing is evaluated, with their metrics; they
    are summed. after: called once the optimiser has made all its steps. passes: over the batch;
    steps: optimiser steps per pass.
    """

    @property
    def session(self) -> Session: ...
    @property
    def passes(self) -> int: ...
    @property
    def steps(self) -> int: ...
    def collect(self, batch: Batch, rows: Sequence[int]) -> C: ...
    def weigh(self, batch: Batch, found: Round[Any], state: Any) -> tuple[Any, Any]: ...
    def losses(
        self, batch: Batch, collected: C, weights: Any
    ) -> Iterator[tuple[Tensor | None, dict[str, Any]]]: ...
    def after(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Round(Generic[C]):
    """Images of a batch.

    steps: micro-batches, by optimiser step; rewards: of all samples in the order of their numbers,
    NaN for one that a reward of whole batches left out; parts: those of a composite reward.
    """

    steps: list[list[C]]
    rewards: list[float]
    metrics: dict[str, Any]
    parts: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


def online_updates(method: OnlineMethod[Any], batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
    """Collect and score a batch, then yield the losses of its optimiser steps."""
    found = collected(method.session, batch, method.steps, partial(method.collect, batch))
    weights, state = method.weigh(batch, found, state)

    def losses(part: Any) -> Iterator[tuple[Tensor | None, dict[str, Any]]]:
        return method.losses(batch, part, weights)

    yield from step_losses(batch, method.passes, found.steps, losses, found.metrics, state)
    method.after(state)


@torch.no_grad()
def collected(
    session: Session, batch: Batch, steps: int, collect: Callable[[list[int]], C]
) -> Round[C]:
    """Collect the samples of this process, cut for a number of optimiser steps."""
    found = [[collect(rows) for rows in step] for step in cut(batch.rows, steps, session.micro)]
    everything = [part for step in found for part in step]
    metrics: dict[str, Any] = {"nfe": over_processes(session, sum(p.nfe for p in everything))}
    if session.reward is not None and session.reward.batched:
        decoded = torch.cat([session.decoder("hard")(part.x0) for part in everything])
        images, out = gather_rows(session, decoded), session.out or Path()
        rewards = session.reward.judge(
            images, batch.prompts, out, batch.update + 1, session.rank == 0
        )
        voted = [value for value in rewards if math.isfinite(value)]
        mean = sum(voted) / len(voted) if voted else math.nan
        return Round(found, rewards, {**metrics, "reward": mean, "voted": len(voted)})
    own = {"": torch.cat([part.reward for part in everything])}
    for name in everything[0].parts:
        own[name] = torch.cat([part.parts[name] for part in everything])
    metrics |= {f"reward_{name}" if name else "reward": values for name, values in own.items()}
    parts = {name: gather_rows(session, v.double()).tolist() for name, v in own.items()}
    return Round(found, parts.pop(""), metrics, parts)


def sampled(session: Session, batch: Batch, rows: Sequence[int]) -> Collected:
    """Sample some images of a batch and score them, unless the reward takes whole batches."""
    run = session.begin(batch, rows)
    x0, last = session.engine.run_to_end(*run)
    reward, parts = x0.new_full((len(rows),), math.nan), {}
    if session.reward is None or not session.reward.batched:
        images = session.decoder("hard")(x0)
        reward, parts = session.score(images, [batch.prompts[row] for row in rows])
    return Collected(rows=list(rows), run=run, x0=x0, reward=reward, parts=parts, nfe=sum(last.nfe))


def cut(rows: Sequence[int], steps: int, micro: int) -> list[list[list[int]]]:
    """Cut rows into micro-batches for each of a number of optimiser steps."""
    return [micro_batches(part, micro) for part in split(rows, steps)]


def step_losses(
    batch: Batch,
    passes: int,
    steps: Sequence[Sequence[P]],
    losses: Callable[[P], Iterator[tuple[Tensor | None, dict[str, Any]]]],
    metrics: dict[str, Any],
    state: Any,
    counts: Sequence[int] | None = None,
) -> Iterator[MicroBatchLoss]:
    """Yield the losses of passes over the steps of a batch, each pass in an order of its own.

    counts: samples of each step over all processes, where these have different numbers; a step of
    none is left out.
    """
    if counts is None:
        counts = [sum(len(part.rows) for part in step) * batch.world for step in steps]
    for number in range(passes):
        order = list(zip(steps, counts, strict=True))
        batch.random(f"pass {number}").shuffle(order)
        for step, count in order:
            if not count:
                continue
            for part in step:
                for loss, found in losses(part):
                    if loss is not None:  # a step that a rule forecasts has no gradient
                        loss = loss.sum() / count if loss.requires_grad else None
                    yield MicroBatchLoss(loss, found)
            yield MicroBatchLoss(None, metrics, step=True, state=state)
            metrics = {}
    if metrics:  # of a batch without a step
        yield MicroBatchLoss(None, metrics, state=state)


def over_processes(session: Session, count: int) -> int:
    """Return the sum of a number over all processes."""
    device = session.pipeline.device
    return int(session.gather(torch.tensor([count], device=device)).sum())


def gather_rows(session: Session, values: Tensor) -> Tensor:
    """Return the values [n, ...] of all samples in the order of their numbers."""
    every = session.gather(values.detach())
    world = len(every) // len(values)
    return every.unflatten(0, (world, len(values))).transpose(0, 1).flatten(0, 1)
