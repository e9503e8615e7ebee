"""One update of a trainer that learns from images of its own: collect, score, weigh, step.

The micro-batches that are trained are those that were collected, with the same samples in the same
order, so that at unchanged weights a network gives the same numbers bit for bit. Optimiser steps
take whole micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sampler.core.trajectory import Run
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, micro_batches
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


C = TypeVar("C", bound=Collected)


class Method(Protocol, Generic[C]):
    """A trainer's part of an update.

    collect: samples and scores images, called without gradient. weigh: from all rewards in the
    order of the samples, what the losses need of them, and the trainer's next state. losses: the
    terms of the loss of each sample [B], None for one without gradient, with their metrics; they
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
    def weigh(self, batch: Batch, rewards: list[float], state: Any) -> tuple[Any, Any]: ...
    def losses(
        self, batch: Batch, collected: C, weights: Any
    ) -> Iterator[tuple[Tensor | None, dict[str, Any]]]: ...
    def after(self, state: Any) -> None: ...


def online_updates(method: Method[Any], batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
    """Collect and score a batch, then yield the losses of its optimiser steps."""
    session = method.session
    share = -(-len(batch.rows) // method.steps)
    steps = [micro_batches(rows, session.micro) for rows in micro_batches(batch.rows, share)]
    with torch.no_grad():
        collected = [[method.collect(batch, rows) for rows in step] for step in steps]
    everything = [part for step in collected for part in step]
    reward = torch.cat([part.reward for part in everything])
    weights, state = method.weigh(batch, gather_rewards(session, reward), state)
    metrics: dict[str, Any] = {"reward": reward, "nfe": sum(part.nfe for part in everything)}
    for name in everything[0].parts:
        metrics[f"reward_{name}"] = torch.cat([part.parts[name] for part in everything])
    for number in range(method.passes):
        order = list(collected)
        batch.random(f"pass {number}").shuffle(order)
        for step in order:
            count = sum(len(part.rows) for part in step) * batch.world
            for part in step:
                for loss, found in method.losses(batch, part, weights):
                    yield MicroBatchLoss(None if loss is None else loss.sum() / count, found)
            yield MicroBatchLoss(None, metrics, step=True, state=state)
            metrics = {}
    method.after(state)


def gather_rewards(session: Session, values: Tensor) -> list[float]:
    """Return the values of all samples in the order of their numbers."""
    every = session.gather(values.detach().double())
    world = len(every) // len(values)
    return every.view(world, -1).T.flatten().tolist()
