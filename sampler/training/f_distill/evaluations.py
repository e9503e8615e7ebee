"""Evaluations of the networks of f-distill; each of them is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from sampler.core.noise import initial
from sampler.training.f_distill.micro_batch import GUIDE, MicroBatch
from sampler.training.f_distill.networks import Distilled
from sampler.training.f_distill.trajectory import StudentSample, StudentTrajectory
from sampler.training.session import Session
from sampler.types import Branch, Level, Prediction, Snapshot, Span


class Evaluations:
    """Networks of a session at work; `nfe` counts the evaluations of this process."""

    def __init__(self, session: Session, trajectory: StudentTrajectory) -> None:
        self.session, self.trajectory = session, trajectory
        self.distilled: Distilled = session.trainable
        self.nfe = 0

    def evaluate(self, model: str, x: Tensor, level: Level, part: MicroBatch) -> Prediction:
        """Evaluate the conditional branch of a network."""
        self.nfe += len(x)
        branches = {"cond": Branch(part.cond.cond, model=model)}
        return self.distilled.networks(x, Span(0, level, level), branches, [0] * len(x))["cond"]

    def student(self, part: MicroBatch, last: int) -> StudentSample:
        """Return what the student makes at its step `last`.

        Its earlier steps come before, without gradient.
        """
        pipeline, levels = self.session.pipeline, self.trajectory.levels
        x = initial(part.seeds, pipeline.latent_shape(*self.session.size))
        x = x.to(pipeline.device) * pipeline.schedule.initial_scale(levels)
        for k, after in enumerate(levels[1 : last + 1]):
            with torch.no_grad():
                pred = self.evaluate("student", x, levels[k], part)
                x = self.trajectory.next(pred, after, part.seeds, k)
        return self.trajectory.sampled(self.evaluate("student", x, levels[last], part), last)

    @torch.no_grad()
    def scores(self, x: Tensor, part: MicroBatch, made: StudentSample) -> tuple[Tensor, Tensor]:
        """Return the estimates of x0 [B, ...] of guided teacher and fake score, at noised x.

        Where the guidance term has a level of its own, the first is D_c(x_t) + (D_guided −
        D_c)(x_s), with x_s the sample `made` noised to that level s.
        """
        if part.guide is None:
            guided = self.guided(x, part.level, part).x0.tensor()
        else:
            x_s = made.noised(part.guide, part.noise(x, GUIDE))
            term = self.guided(x_s, part.guide, part).x0 - self.cond(x_s, part.guide, part).x0
            guided = (self.cond(x, part.level, part).x0 + term).tensor()
        return guided, self.evaluate("fake", x, part.level, part).x0.tensor()

    def guided(self, x: Tensor, level: Level, part: MicroBatch) -> Prediction:
        """Return the guided teacher's prediction; for its rule x is at the first step of a run."""
        span, zeros = Span(0, level, level), (0,) * len(x)
        start = Snapshot(0, x, (), part.rule.start(part.cond), part.seeds, zeros)
        pred, _, nfe = self.session.engine.predict(start, span, part.cond, part.rule)
        self.nfe += sum(nfe)
        return pred

    def cond(self, x: Tensor, level: Level, part: MicroBatch) -> Prediction:
        """Return the teacher's prediction without guidance."""
        return self.evaluate("main", x, level, part)

    def logits(self, x: Tensor, part: MicroBatch) -> Tensor:
        """Return the discriminator's logits [B, K] of noised x; zeros without a discriminator."""
        if self.distilled.heads is None:
            return x.new_zeros(len(x), 1)
        self.nfe += len(x)
        return self.distilled.heads(x, part.level, part.cond.cond)
