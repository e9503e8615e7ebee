"""The three kinds of f-distill's updates: of the student, of its critics, and the warm-up.

Each row has its own noise z, level t and noise eps, functions of (seed, update, row). Where a batch
is cut into micro-batches the student's images are made twice, since the weights h are normalised
over all rows of all processes before there is a gradient.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sampler.core.noise import Noise, initial
from sampler.training.base import Update
from sampler.training.batches import Batch, derived, parts
from sampler.training.f_distill.losses import (
    Weighting,
    discriminator_rows,
    generator_rows,
    matching_rows,
)
from sampler.training.f_distill.setup import encoded, student_levels, time_of
from sampler.types import Branch, Cond, Guidance, Level, Prediction, Snapshot, Span

if TYPE_CHECKING:
    from sampler.training.f_distill.networks import Distilled
    from sampler.training.f_distill.trainer import FDistill
    from sampler.training.session import Session

# Numbers of a row's noises in the stream "renoise"; the student's own steps use "step".
PERTURB, DENOISE, TELL = 0, 1, 2


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: their numbers, prompts and seeds; conditions, and the teacher's rule
    bound to them; the level of each row (tensors [B]), and its share of the schedule."""

    numbers: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    cond: Cond
    rule: Guidance
    level: Level
    shares: tuple[float, ...]


class Step:
    """One update of a run."""

    def __init__(self, trainer: FDistill, session: Session, batch: Batch) -> None:
        self.trainer, self.session, self.batch = trainer, session, batch
        self.made: Distilled = session.adapter
        self.pipeline = session.engine.pipeline
        self.levels = student_levels(trainer, self.pipeline.schedule)
        self.last = batch.random("step").randrange(len(self.levels))  # of the student's steps
        self.pieces = [self.rows(piece) for piece in parts(batch.rows, session.micro)]
        self.evaluated = 0  # rows, in this process

    def matching(self, state: Any) -> Iterator[Update]:
        """The student's update: the weights of the whole batch, then the gradient."""
        once = len(self.pieces) == 1
        with torch.set_grad_enabled(once):
            made = [self.told(rows) for rows in self.pieces]
        shares = [share for rows in self.pieces for share in rows.shares]
        h, ratio, bins = self.weights(torch.cat([told for *_, told in made]), shares, state["bins"])
        sizes = [len(rows.seeds) for rows in self.pieces]
        for rows, found, weight, r in zip(
            self.pieces, made, h.split(sizes), ratio.split(sizes), strict=True
        ):
            x, x_t, told = found if once else self.told(rows)
            match = matching_rows(x, *self.scores(x_t.detach(), rows), weight)
            fool = generator_rows(told)
            metrics = {"match": match, "fool": fool, "h": weight, "ratio": r}
            after = {"bins": bins, "students": state["students"] + 1}
            loss = match + self.trainer.gan_weight * fool
            yield self.share(loss, rows, "student.", metrics, after)
        self.made.follow(self.trainer.ema, state["students"])

    def critics(self) -> Iterator[Update]:
        """The fake score's update on the student's images, then the discriminator's."""
        with torch.no_grad():
            images = [self.student(rows) for rows in self.pieces]
        for rows, x in zip(self.pieces, images, strict=True):
            error = self.denoising(x, rows)
            yield self.share(error, rows, "fake.", {"denoise": error})
        if self.made.heads is None:
            return
        for rows, x in zip(self.pieces, images, strict=True):
            fake = self.logits(self.noised(x, rows, TELL), rows)
            real = self.logits(self.noised(self.real(rows, x), rows, TELL), rows)
            error = discriminator_rows(real, fake)
            right = ((real.mean(1) > 0).float() + (fake.mean(1) < 0).float()) / 2
            yield self.share(error, rows, "heads.", {"tell": error, "told_right": right})

    def regression(self, state: Any) -> Iterator[Update]:
        """The warm-up's update: the teacher's image from the very noise that it was made of."""
        pairs = self.made.pairs
        assert pairs is not None
        for rows in self.pieces:
            chosen = [int(u * len(pairs.prompts)) for u in self.numbers(rows)]
            seeds = tuple(pairs.seeds[i] for i in chosen)
            cond, _ = encoded(self.session, [pairs.prompts[i] for i in chosen])
            x = self.student(replace(rows, seeds=seeds, cond=cond), 0)
            goal = pairs.latents[chosen].to(x)
            error = 0.5 * (x - goal).float().square().flatten(1).mean(1)
            after = {**state, "students": state["students"] + 1}
            yield self.share(error, rows, "student.", {"regression": error}, after)
        self.made.follow(self.trainer.ema, state["students"])

    def share(
        self, loss: Tensor, rows: Rows, group: str, metrics: dict[str, Tensor], state: Any = None
    ) -> Update:
        """The share of some rows, with their losses [B]; the optimiser steps after the last."""
        found: dict[str, Any] = {name: value.detach() for name, value in metrics.items()}
        found["nfe"] = self.evaluated * self.batch.world
        step = rows is self.pieces[-1]
        return Update(loss.sum() / len(self.batch.prompts), found, step, state, group)

    def rows(self, numbers: Sequence[int]) -> Rows:
        """Everything about some rows that does not depend on the networks that learn."""
        prompts = tuple(self.batch.prompts[n] for n in numbers)
        seeds = tuple(self.batch.seeds[n] for n in numbers)
        cond, rule = encoded(self.session, prompts)
        low, high = self.trainer.times
        shares = tuple(low + (high - low) * self.random(n, "time").random() for n in numbers)
        schedule, device = self.pipeline.schedule, self.pipeline.device
        levels = [schedule.level(time_of(schedule, share)) for share in shares]
        level = Level(*(torch.tensor(v, device=device) for v in zip(*levels, strict=True)))
        return Rows(tuple(numbers), prompts, seeds, cond, rule, level, shares)

    def student(self, rows: Rows, last: int | None = None) -> Tensor:
        """G(z) [B, ...]: the student's estimate of x0 at its step `last`, behind its own earlier
        ones, through which no gradient flows."""
        last = self.last if last is None else last
        x = initial(rows.seeds, self.pipeline.latent_shape(*self.session.size))
        x = x.to(self.pipeline.device) * self.pipeline.schedule.initial_scale(self.levels)
        for k, after in enumerate(self.levels[1 : last + 1]):
            with torch.no_grad():
                x0 = self.ask("student", x, self.levels[k], rows)
                x = after.alpha * x0.x0.tensor() + after.sigma * Noise(rows.seeds).draw(k, x)
        return self.ask("student", x, self.levels[last], rows).x0.tensor()

    def told(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """(the student's images, the same noised, the discriminator's logits of those)."""
        x = self.student(rows)
        x_t = self.noised(x, rows, PERTURB)
        return x, x_t, self.logits(x_t, rows)

    def scores(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The estimates of x0 [B, ...] of the guided teacher and of the fake score, at noised x.

        To the rule every row is a first step of its own.
        """
        span, zeros = Span(0, rows.level, rows.level), (0,) * len(x)
        with torch.no_grad():
            start = Snapshot(0, x, (), rows.rule.start(rows.cond), rows.seeds, zeros)
            pred, _, nfe = self.session.engine.predict(start, span, rows.cond, rows.rule)
            self.evaluated += sum(nfe)
            return pred.x0.tensor(), self.ask("fake", x, rows.level, rows).x0.tensor()

    def denoising(self, x: Tensor, rows: Rows) -> Tensor:
        """The fake score's error per row [B], in the network's own parametrisation."""
        eps = self.noise(x, rows, DENOISE)
        pred = self.ask("fake", self.noised(x, rows, DENOISE), rows.level, rows)
        alpha, sigma = self.wide(rows, x)
        goal = {"x0": x, "eps": eps, "v": alpha * eps - sigma * x, "velocity": eps - x}[pred.kind]
        return (pred.out.tensor().float() - goal).square().flatten(1).mean(1)

    def ask(self, model: str, x: Tensor, level: Level, rows: Rows) -> Prediction:
        """One conditional evaluation of a network: B rows."""
        self.evaluated += len(x)
        branches = {"cond": Branch(rows.cond.cond, model=model)}
        return self.made.world(x, Span(0, level, level), branches, [0] * len(x))["cond"]

    def logits(self, x: Tensor, rows: Rows) -> Tensor:
        """The discriminator's logits [B, K] of noised x; zeros where there is none."""
        if self.made.heads is None:
            return x.new_zeros(len(x), 1)
        self.evaluated += len(x)
        return self.made.heads(x, rows.level, rows.cond.cond)

    def weights(self, logits: Tensor, shares: list[float], bins: list[float]) -> Any:
        """(h, r, next bins) for all rows of this process; see `Weighting`."""
        own = self.trainer
        weighting = Weighting(own.divergence, own.low, own.high, own.times, own.memory)
        return weighting(logits, torch.tensor(shares), bins, self.session.gather)

    def real(self, rows: Rows, like: Tensor) -> Tensor:
        """A real sample [B, ...] of each row's prompt."""
        assert self.made.real is not None
        return self.made.real.latents[self.made.real.choose(rows.prompts, self.numbers(rows))].to(
            like
        )

    def noised(self, x: Tensor, rows: Rows, purpose: int) -> Tensor:
        """x at the rows' levels."""
        alpha, sigma = self.wide(rows, x)
        return alpha * x + sigma * self.noise(x, rows, purpose)

    def noise(self, x: Tensor, rows: Rows, purpose: int) -> Tensor:
        return Noise(rows.seeds).draw(purpose, x, "renoise")

    def wide(self, rows: Rows, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the rows, as [B, 1, ...] of x's dtype."""
        shape = (-1, *(1,) * (x.ndim - 1))
        return rows.level.alpha.to(x).view(shape), rows.level.sigma.to(x).view(shape)

    def numbers(self, rows: Rows) -> list[float]:
        """A number in [0, 1) per row, to choose a sample by."""
        return [self.random(n, "sample").random() for n in rows.numbers]

    def random(self, row: int, purpose: str) -> random.Random:
        """A row's own generator: the same on every process and every resume."""
        return random.Random(derived(self.batch.seed, self.batch.update, f"{purpose} {row}"))
