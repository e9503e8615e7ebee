"""The three kinds of updates of f-distill: student, critics, and warm-up regression.

Each sample has its own noise z, level t and noise eps, functions of (seed, update, sample). Where a
batch is split into micro-batches the student's images are computed twice, since the weights h are
normalised over all samples of all processes before there is a gradient.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sampler.core.errors import SamplerError
from sampler.core.noise import Noise, initial
from sampler.objectives import denoising_error
from sampler.training.averages import warm_decay
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, derived, micro_batches
from sampler.training.data import LatentSet
from sampler.training.f_distill.losses import (
    Weighting,
    discriminator_loss,
    generator_loss,
    matching_loss,
)
from sampler.training.f_distill.networks import Distilled
from sampler.training.session import Session
from sampler.training.time_shares import level_of
from sampler.training.times import TimeLaw, Uniform
from sampler.types import Branch, Cond, Guidance, Level, Prediction, Snapshot, Span

# Numbers of a sample's noises in the stream "renoise"; the student's own steps use "step".
PERTURB, DENOISE, DISCRIMINATE = 0, 1, 2


@dataclass(frozen=True)
class DistillObjective:
    """levels: of the student, noisy first; gan_weight: of the adversarial loss; ema: decay.

    law: of the levels of training, within the times of `weighting`.
    """

    levels: tuple[Level, ...]
    weighting: Weighting
    gan_weight: float
    ema: float
    law: TimeLaw = field(default_factory=Uniform)


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a batch, without what depends on the trained networks.

    numbers: of the samples in the batch; rule: the teacher's, bound to the conditions; level: of
    each sample (tensors [B]); fractions: the levels as fractions of the schedule.
    """

    numbers: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    cond: Cond
    rule: Guidance
    level: Level
    fractions: tuple[float, ...]


class DistillStep:
    """One update of a run; `nfe` counts the network evaluations of this process."""

    def __init__(self, objective: DistillObjective, session: Session, batch: Batch) -> None:
        self.objective, self.session, self.batch = objective, session, batch
        self.distilled: Distilled = session.trainable
        self.pipeline = session.pipeline
        self.levels = objective.levels
        self.last = batch.random("step").randrange(len(self.levels))  # of the student's steps
        self.parts = [self.part(rows) for rows in micro_batches(batch.rows, session.micro)]
        self.nfe = 0

    def matching(self, state: Any) -> Iterator[MicroBatchLoss]:
        """Yield the student's losses; the weights h are computed for the whole batch first."""
        once = len(self.parts) == 1
        with torch.set_grad_enabled(once):
            sampled = [self.student_sample_and_logits(part) for part in self.parts]
        fractions = [value for part in self.parts for value in part.fractions]
        logits = torch.cat([logits for *_, logits in sampled])
        h, ratio, bins = self.weights(logits, fractions, state["bins"])
        sizes = [len(part.seeds) for part in self.parts]
        for part, found, weight, r in zip(
            self.parts, sampled, h.split(sizes), ratio.split(sizes), strict=True
        ):
            x, x_t, logits = found if once else self.student_sample_and_logits(part)
            distill = matching_loss(x, *self.scores(x_t.detach(), part), weight)
            gan = generator_loss(logits)
            metrics = {"loss_distill": distill, "loss_gan": gan, "h": weight, "ratio": r}
            after = {"bins": bins, "students": state["students"] + 1}
            loss = distill + self.objective.gan_weight * gan
            yield self.loss(loss, part, "student.", metrics, after)
        self.distilled.ema.follow(warm_decay(self.objective.ema, state["students"]))

    def critics(self) -> Iterator[MicroBatchLoss]:
        """Yield the fake score's losses on the student's images, then the discriminator's."""
        with torch.no_grad():
            images = [self.student(part) for part in self.parts]
        for part, x in zip(self.parts, images, strict=True):
            error = self.denoising_loss(x, part)
            yield self.loss(error, part, "fake.", {"loss_fake_score": error})
        if self.distilled.heads is None:
            return
        for part, x in zip(self.parts, images, strict=True):
            fake = self.logits(self.noised(x, part, DISCRIMINATE), part)
            real = self.logits(self.noised(self.real(part, x), part, DISCRIMINATE), part)
            loss = discriminator_loss(real, fake)
            correct = ((real.mean(1) > 0).float() + (fake.mean(1) < 0).float()) / 2
            metrics = {"loss_discriminator": loss, "discriminator_accuracy": correct}
            yield self.loss(loss, part, "heads.", metrics)

    def regression(self, state: Any) -> Iterator[MicroBatchLoss]:
        """Yield the losses of the warm-up: the teacher's image from the noise that it came from."""
        pairs = _given(self.distilled.pairs, "images of the teacher")
        for part in self.parts:
            chosen = [int(u * len(pairs.prompts)) for u in self.choices(part)]
            seeds = tuple(pairs.seeds[i] for i in chosen)
            _, cond = self.session.encode([pairs.prompts[i] for i in chosen])
            x = self.student(replace(part, seeds=seeds, cond=cond), 0)
            target = pairs.latents[chosen].to(x)
            error = 0.5 * (x - target).float().square().flatten(1).mean(1)
            after = {**state, "students": state["students"] + 1}
            yield self.loss(error, part, "student.", {"regression": error}, after)
        self.distilled.ema.follow(warm_decay(self.objective.ema, state["students"]))

    def loss(
        self,
        values: Tensor,
        part: MicroBatch,
        prefix: str,
        metrics: dict[str, Tensor],
        state: Any = None,
    ) -> MicroBatchLoss:
        """Reduce the losses [B] of a micro-batch; the optimiser steps after the last one."""
        found: dict[str, Any] = {name: value.detach() for name, value in metrics.items()}
        found["nfe"] = self.nfe * self.batch.world
        step = part is self.parts[-1]
        return MicroBatchLoss(values.sum() / len(self.batch.prompts), found, step, state, prefix)

    def part(self, rows: Sequence[int]) -> MicroBatch:
        """Return the micro-batch of some samples."""
        prompts = tuple(self.batch.prompts[n] for n in rows)
        seeds = tuple(self.batch.seeds[n] for n in rows)
        rule, cond = self.session.encode(prompts)
        schedule, device = self.pipeline.schedule, self.pipeline.device
        low, high = self.objective.weighting.times
        law, progress = self.objective.law, self.batch.progress
        shares = [law.share(self.random(n, "time").random(), progress, schedule) for n in rows]
        fractions = tuple(low + (high - low) * share for share in shares)
        levels = [level_of(schedule, value) for value in fractions]
        level = Level(*(torch.tensor(v, device=device) for v in zip(*levels, strict=True)))
        return MicroBatch(tuple(rows), prompts, seeds, cond, rule, level, fractions)

    def student(self, part: MicroBatch, last: int | None = None) -> Tensor:
        """Return G(z) [B, ...], the student's estimate of x0 at its step `last`.

        Its earlier steps come before, without gradient.
        """
        last = self.last if last is None else last
        x = initial(part.seeds, self.pipeline.latent_shape(*self.session.size))
        x = x.to(self.pipeline.device) * self.pipeline.schedule.initial_scale(self.levels)
        for k, after in enumerate(self.levels[1 : last + 1]):
            with torch.no_grad():
                x0 = self.evaluate("student", x, self.levels[k], part)
                x = after.alpha * x0.x0.tensor() + after.sigma * Noise(part.seeds).draw(k, x)
        return self.evaluate("student", x, self.levels[last], part).x0.tensor()

    def student_sample_and_logits(self, part: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's samples, the noised samples, and their discriminator logits."""
        x = self.student(part)
        x_t = self.noised(x, part, PERTURB)
        return x, x_t, self.logits(x_t, part)

    def scores(self, x: Tensor, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the estimates of x0 [B, ...] of guided teacher and fake score, at noised x.

        For the rule every sample is at the first step of a run.
        """
        span, zeros = Span(0, part.level, part.level), (0,) * len(x)
        with torch.no_grad():
            start = Snapshot(0, x, (), part.rule.start(part.cond), part.seeds, zeros)
            pred, _, nfe = self.session.engine.predict(start, span, part.cond, part.rule)
            self.nfe += sum(nfe)
            return pred.x0.tensor(), self.evaluate("fake", x, part.level, part).x0.tensor()

    def denoising_loss(self, x: Tensor, part: MicroBatch) -> Tensor:
        """Return the fake score's error per sample [B], in the network's own parametrisation."""
        eps = self.noise(x, part, DENOISE)
        pred = self.evaluate("fake", self.noised(x, part, DENOISE), part.level, part)
        return denoising_error(pred, x, eps)

    def evaluate(self, model: str, x: Tensor, level: Level, part: MicroBatch) -> Prediction:
        """Evaluate the conditional branch of a network."""
        self.nfe += len(x)
        branches = {"cond": Branch(part.cond.cond, model=model)}
        return self.distilled.networks(x, Span(0, level, level), branches, [0] * len(x))["cond"]

    def logits(self, x: Tensor, part: MicroBatch) -> Tensor:
        """Return the discriminator's logits [B, K] of noised x; zeros without a discriminator."""
        if self.distilled.heads is None:
            return x.new_zeros(len(x), 1)
        self.nfe += len(x)
        return self.distilled.heads(x, part.level, part.cond.cond)

    def weights(
        self, logits: Tensor, fractions: list[float], bins: list[float]
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Return (h, r, next bins) for all samples of this process; see `Weighting`."""
        weighting, gather = self.objective.weighting, self.session.gather
        return weighting(logits, torch.tensor(fractions), bins, gather)

    def real(self, part: MicroBatch, like: Tensor) -> Tensor:
        """Return a real sample [B, ...] of each prompt."""
        real = _given(self.distilled.real, "real samples")
        return real.latents[real.choose(part.prompts, self.choices(part))].to(like)

    def noised(self, x: Tensor, part: MicroBatch, purpose: int) -> Tensor:
        """Return x at the levels of the micro-batch."""
        alpha, sigma = self.alpha_sigma(part, x)
        return alpha * x + sigma * self.noise(x, part, purpose)

    def noise(self, x: Tensor, part: MicroBatch, purpose: int) -> Tensor:
        """Draw noise of the shape of x."""
        return Noise(part.seeds).draw(purpose, x, "renoise")

    def alpha_sigma(self, part: MicroBatch, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma as [B, 1, ...] of x's dtype."""
        shape = (-1, *(1,) * (x.ndim - 1))
        return part.level.alpha.to(x).view(shape), part.level.sigma.to(x).view(shape)

    def choices(self, part: MicroBatch) -> list[float]:
        """Draw a number in [0, 1) per sample, to choose a real sample by."""
        return [self.random(n, "sample").random() for n in part.numbers]

    def random(self, row: int, purpose: str) -> random.Random:
        """Return a sample's own generator: equal in every process and on every resume."""
        return random.Random(derived(self.batch.seed, self.batch.update, f"{purpose} {row}"))


def _given(samples: LatentSet | None, name: str) -> LatentSet:
    if samples is None:
        raise SamplerError(f"f_distill: this update needs {name}, and the run has none.")
    return samples
