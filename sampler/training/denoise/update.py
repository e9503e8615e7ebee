"""One update of supervised fine-tuning: noised images, and the network's error on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sampler.core.noise import Noise
from sampler.core.trajectory import conditions
from sampler.objectives import denoising_error, min_snr_weight
from sampler.objectives.samples import broadcast
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, derived, micro_batches
from sampler.training.data import LatentSet
from sampler.training.session import Session
from sampler.training.time_shares import level_of
from sampler.training.times import TimeLaw
from sampler.types import Branch, Cond, Level, Prediction, Span


@dataclass(frozen=True)
class DenoiseObjective:
    """Fields of the trainer that decide the loss; see `Denoise`."""

    times: TimeLaw
    weight: Literal["none", "min_snr"]
    gamma: float
    dropout: float


@dataclass(frozen=True)
class Update:
    """One optimiser step on a batch of images; level, noise and dropout are the samples' own."""

    objective: DenoiseObjective
    session: Session
    batch: Batch
    data: LatentSet

    def losses(self) -> Iterator[MicroBatchLoss]:
        parts = micro_batches(self.batch.rows, self.session.micro)
        for number, rows in enumerate(parts):
            shares, level = self.levels(rows)
            error, weight = self.errors(rows, level)
            metrics: dict[str, Tensor | float] = {
                "error": error.detach(),
                "time": torch.tensor(shares),
                "nfe": len(self.batch.prompts),
            }
            loss = (weight * error).sum() / len(self.batch.prompts)
            yield MicroBatchLoss(loss, metrics, step=number == len(parts) - 1)

    def levels(self, rows: Sequence[int]) -> tuple[list[float], Level]:
        """Return shares of the training time, and the level with tensors [B]."""
        law, progress = self.objective.times, self.batch.progress
        schedule, device = self.session.pipeline.schedule, self.session.pipeline.device
        shares = [law.share(self.draw(row, "time"), progress, schedule) for row in rows]
        levels = [level_of(schedule, share) for share in shares]
        return shares, Level(*(torch.tensor(v, device=device) for v in zip(*levels, strict=True)))

    def errors(self, rows: Sequence[int], level: Level) -> tuple[Tensor, Tensor]:
        """Return the network's error on noised images, and its weight, [B] both."""
        x0 = self.data.latents[[self.batch.numbers[row] for row in rows]]
        x0 = x0.to(self.session.pipeline.device)
        eps = Noise(tuple(self.batch.seeds[row] for row in rows)).draw(0, x0, "renoise")
        x = broadcast(level.alpha.to(x0), x0) * x0 + broadcast(level.sigma.to(x0), x0) * eps
        pred = self.predict(x, level, rows)
        error = denoising_error(pred, x0, eps)
        if self.objective.weight == "none":
            return error, torch.ones_like(error)
        return error, min_snr_weight(pred.kind, level, self.objective.gamma).to(error)

    def predict(self, x: Tensor, level: Level, rows: Sequence[int]) -> Prediction:
        """Evaluate each sample with its caption, or without it where that is dropped.

        The rows that the branch "uncond" leaves out are those of "cond".
        """
        kept = torch.tensor([self.draw(r, "caption") >= self.objective.dropout for r in rows])
        cond = self.encode(rows, not bool(kept.all()))
        branches = {"cond": Branch(cond.cond, rows=None if bool(kept.all()) else kept)}
        if not bool(kept.all()):
            branches["uncond"] = Branch(cond.uncond, rows=~kept)
        preds = self.session.network()(x, Span(0, level, level), branches, [0] * len(rows))
        return preds.get("uncond", preds.get("cond"))

    def encode(self, rows: Sequence[int], dropped: bool) -> Cond:
        session = self.session
        texts, empty = [self.batch.prompts[row] for row in rows], [""] * len(rows)
        with torch.no_grad():
            cond = session.pipeline.encode(texts, empty, dropped, session.size)
            return conditions(
                session.pipeline, texts, empty, session.size, session.method, session.rule, (), cond
            )[1]

    def draw(self, row: int, purpose: str) -> float:
        """Return a sample's own number in [0, 1), the same in every process and on every resume."""
        seed = derived(self.batch.seed, self.batch.update, f"{purpose} {row}")
        return random.Random(seed).random()
