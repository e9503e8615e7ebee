"""The samples of an update, with everything that does not depend on the trained networks.

Each sample has its own noise z, level t and further noise, functions of (seed, update, sample).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sampler.core.noise import Noise
from sampler.training.batches import Batch, derived
from sampler.training.f_distill.fields import TimeRange
from sampler.training.session import Session
from sampler.training.time_shares import level_of
from sampler.training.times import TimeLaw
from sampler.types import Cond, Guidance, Level

# Numbers of a sample's noises in the stream "renoise"; the student's own steps use "step".
PERTURB, DENOISE, DISCRIMINATE, GUIDE = 0, 1, 2, 3


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a batch.

    numbers: of the samples in the batch; rule: the teacher's, bound to the conditions; level: of
    each sample (tensors [B]); fractions: the levels as fractions of the schedule. guide: level of
    the guidance term, where it has its own.
    """

    numbers: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    cond: Cond
    rule: Guidance
    level: Level
    fractions: tuple[float, ...]
    guide: Level | None = None

    def noise(self, like: Tensor, purpose: int) -> Tensor:
        """Draw noise of the shape of `like` for a purpose."""
        return Noise(self.seeds).draw(purpose, like, "renoise")


@dataclass(frozen=True)
class Draw:
    """The random choices of an update. law: of the noise levels of training."""

    session: Session
    batch: Batch
    law: TimeLaw

    def part(
        self, rows: Sequence[int], times: TimeRange, guide: TimeRange | None = None
    ) -> MicroBatch:
        """Return the micro-batch of some samples, at levels within a range of fractions.

        guide: the range of the guidance term's own levels.
        """
        prompts = tuple(self.batch.prompts[n] for n in rows)
        seeds = tuple(self.batch.seeds[n] for n in rows)
        rule, cond = self.session.encode(prompts)
        level, fractions = self._levels(rows, times, "time")
        own = None if guide is None else self._levels(rows, guide, "guide")[0]
        return MicroBatch(tuple(rows), prompts, seeds, cond, rule, level, fractions, own)

    def _levels(
        self, rows: Sequence[int], times: TimeRange, purpose: str
    ) -> tuple[Level, tuple[float, ...]]:
        """Draw a level of each sample, as tensors [B], and the fraction of each."""
        (low, high), progress = times, self.batch.progress
        pipeline = self.session.pipeline
        draws = [self.random(row, purpose).random() for row in rows]
        shares = [self.law.share(u, progress, pipeline.schedule) for u in draws]
        fractions = tuple(low + (high - low) * share for share in shares)
        levels = [level_of(pipeline.schedule, value) for value in fractions]
        values = (torch.tensor(v, device=pipeline.device) for v in zip(*levels, strict=True))
        return Level(*values), fractions

    def choices(self, part: MicroBatch) -> list[float]:
        """Draw a number in [0, 1) per sample, to choose a real sample by."""
        return [self.random(n, "sample").random() for n in part.numbers]

    def random(self, row: int, purpose: str) -> random.Random:
        """Return a sample's own generator: equal in every process and on every resume."""
        return random.Random(derived(self.batch.seed, self.batch.update, f"{purpose} {row}"))
