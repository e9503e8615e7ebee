"""The three kinds of updates of f-distill: student, critics, and warm-up regression.

Where a batch is split into micro-batches the student's images are computed twice, since the weights
h are normalised over all samples of all processes before there is a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sampler.core.errors import SamplerError
from sampler.objectives import renoised
from sampler.training.averages import warm_decay
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, micro_batches
from sampler.training.data import LatentSet
from sampler.training.f_distill.evaluations import Evaluations
from sampler.training.f_distill.fields import TimeRange
from sampler.training.f_distill.losses import Weighting, discriminator_loss, generator_loss
from sampler.training.f_distill.micro_batch import (
    DENOISE,
    DISCRIMINATE,
    PERTURB,
    Draw,
    MicroBatch,
)
from sampler.training.f_distill.networks import Distilled
from sampler.training.f_distill.trajectory import CLEAN, StudentSample, StudentTrajectory
from sampler.training.session import Session
from sampler.training.times import TimeLaw, Uniform


@dataclass(frozen=True)
class DistillObjective:
    """trajectory: of the student; gan_weight: of the adversarial loss; ema: decay.

    law: of the levels of training, within the times of the trajectory. guidance_times: range of the
    guidance term's own levels; student_lr: factor of the learning rate in the student's updates.
    """

    trajectory: StudentTrajectory
    weighting: Weighting
    gan_weight: float
    ema: float
    law: TimeLaw = field(default_factory=Uniform)
    guidance_times: TimeRange | None = None
    student_lr: float = 1.0


class DistillStep:
    """One update of a run."""

    def __init__(self, objective: DistillObjective, session: Session, batch: Batch) -> None:
        self.objective, self.session, self.batch = objective, session, batch
        self.distilled: Distilled = session.trainable
        self.trajectory = objective.trajectory
        self.last = batch.random("step").randrange(len(self.trajectory.levels))
        self.draw = Draw(session, batch, objective.law)
        times, guide = self.trajectory.times_of(self.last), objective.guidance_times
        guide = None if guide is None else self.trajectory.above(guide, self.last)
        rows = micro_batches(batch.rows, session.micro)
        self.parts = [self.draw.part(numbers, times, guide) for numbers in rows]
        self.networks = Evaluations(session, self.trajectory)

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
            made, x_t, logits = found if once else self.student_sample_and_logits(part)
            scores = self.networks.scores(x_t.detach(), part, made)
            distill = self.trajectory.student_loss(made, *scores, weight)
            gan = generator_loss(logits)
            metrics = {"loss_distill": distill, "loss_gan": gan, "h": weight, "ratio": r}
            after = {"bins": bins, "students": state["students"] + 1}
            loss = distill + self.objective.gan_weight * gan
            yield self.loss(loss, part, "student.", metrics, after)
        self.distilled.ema.follow(warm_decay(self.objective.ema, state["students"]))

    def critics(self) -> Iterator[MicroBatchLoss]:
        """Yield the fake score's losses on the student's images, then the discriminator's."""
        with torch.no_grad():
            images = [self.networks.student(part, self.last) for part in self.parts]
        for part, made in zip(self.parts, images, strict=True):
            error = self.denoising_loss(made, part)
            yield self.loss(error, part, "fake.", {"loss_fake_score": error})
        if self.distilled.heads is None:
            return
        for part, made in zip(self.parts, images, strict=True):
            noise = part.noise(made.mid, DISCRIMINATE)
            real = renoised(self.real(part, made.x0), CLEAN, part.level, noise)
            fake = self.networks.logits(made.noised(part.level, noise), part)
            real = self.networks.logits(real, part)
            loss = discriminator_loss(real, fake)
            correct = ((real.mean(1) > 0).float() + (fake.mean(1) < 0).float()) / 2
            metrics = {"loss_discriminator": loss, "discriminator_accuracy": correct}
            yield self.loss(loss, part, "heads.", metrics)

    def regression(self, state: Any) -> Iterator[MicroBatchLoss]:
        """Yield the losses of the warm-up: the teacher's image from the noise that it came from."""
        pairs = _given(self.distilled.pairs, "images of the teacher")
        for part in self.parts:
            chosen = [int(u * len(pairs.prompts)) for u in self.draw.choices(part)]
            seeds = tuple(pairs.seeds[i] for i in chosen)
            _, cond = self.session.encode([pairs.prompts[i] for i in chosen])
            x = self.networks.student(replace(part, seeds=seeds, cond=cond), 0).x0
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
        found["nfe"] = self.networks.nfe * self.batch.world
        step, mean = part is self.parts[-1], values.sum() / len(self.batch.prompts)
        lr = self.objective.student_lr if prefix == "student." else 1.0
        return MicroBatchLoss(mean, found, step, state, prefix, lr)

    def student_sample_and_logits(self, part: MicroBatch) -> tuple[StudentSample, Tensor, Tensor]:
        """Return the student's samples, the noised samples, and their discriminator logits."""
        made = self.networks.student(part, self.last)
        x_t = made.noised(part.level, part.noise(made.mid, PERTURB))
        return made, x_t, self.networks.logits(x_t, part)

    def denoising_loss(self, made: StudentSample, part: MicroBatch) -> Tensor:
        """Return the fake score's error per sample [B]."""
        noise = part.noise(made.mid, DENOISE)
        x_t = made.noised(part.level, noise)
        pred = self.networks.evaluate("fake", x_t, part.level, part)
        return self.trajectory.fake_loss(pred, made, part.level, noise)

    def weights(
        self, logits: Tensor, fractions: list[float], bins: list[float]
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Return (h, r, next bins) for all samples of this process; see `Weighting`."""
        weighting, gather = self.objective.weighting, self.session.gather
        return weighting(logits, torch.tensor(fractions), bins, gather)

    def real(self, part: MicroBatch, like: Tensor) -> Tensor:
        """Return a real sample [B, ...] of each prompt."""
        real = _given(self.distilled.real, "real samples")
        return real.latents[real.choose(part.prompts, self.draw.choices(part))].to(like)


def _given(samples: LatentSet | None, name: str) -> LatentSet:
    if samples is None:
        raise SamplerError(f"f_distill: this update needs {name}, and the run has none.")
    return samples
