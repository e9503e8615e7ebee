"""Matching update: samples of the old weights, renoised and predicted by the new ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import torch
from sampler_kernels import settle
from torch import Tensor

from sampler import registry
from sampler.core.noise import Noise
from sampler.objectives import output_distance
from sampler.training.averages import Average
from sampler.training.batches import Batch
from sampler.training.group_advantages import combined_advantages, flat_rows
from sampler.training.matching.base import Matched, MatchingBase
from sampler.training.matching.levels import flow_sigma, matching_levels
from sampler.training.online import Collected, Round, sampled
from sampler.training.session import Session
from sampler.types import Cond, Guidance, Level, Prediction, Snapshot, Span


@dataclass(frozen=True)
class Matching:
    """The part of a matching trainer in an update; see `sampler.training.online.OnlineMethod`."""

    trainer: MatchingBase
    session: Session

    @property
    def passes(self) -> int:
        return self.trainer.passes

    @property
    def steps(self) -> int:
        return self.trainer.minibatches

    @property
    def old(self) -> Average:
        return self.session.trainable.averages["old"]

    def collect(self, batch: Batch, rows: Sequence[int]) -> Collected:
        with self.old.in_place():
            return sampled(self.session, batch, rows)

    def weigh(self, batch: Batch, found: Round[Any], state: Any) -> tuple[Tensor, Any]:
        """Return the clipped advantages [N], NaN for samples without a reward to compare."""
        trainer, rewards, groups = self.trainer, found.rewards, batch.groups
        scored = Counter(g for g, r in zip(groups, rewards, strict=True) if isfinite(r))
        rows = [i for i, r in enumerate(rewards) if isfinite(r) and scored[groups[i]] > 1]
        groups, values = [groups[i] for i in rows], [rewards[i] for i in rows]
        parts = {name: [part[i] for i in rows] for name, part in found.parts.items()}
        advantages = torch.full((len(rewards),), nan, dtype=torch.float64)
        combine, reward, given = trainer.advantages, self.session.reward, (groups, values, parts)
        made = combined_advantages(combine, trainer.std, reward, *given)
        advantages[rows] = torch.from_numpy(made)
        flat = flat_rows(combine, reward, *given)
        found.metrics["flat_groups"] = sum(flat) / max(1, len(rows))
        limit, steps = trainer.max_advantage, self.passes * self.steps
        return advantages.clamp(-limit, limit), {"steps": state["steps"] + steps}

    def after(self, state: Any) -> None:
        """Move the averages towards the new weights, after the last optimiser step."""
        for name, decay in self.trainer.decays(state["steps"]).items():
            self.session.trainable.averages[name].follow(decay)

    def losses(
        self, batch: Batch, collected: Collected, weights: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        trainer = self.trainer
        law, limits = trainer.law, (trainer.low, trainer.high)
        levels = matching_levels(self.session, batch, law, trainer.times, trainer.shift, *limits)
        advantage = weights[collected.rows].to(collected.x0)
        weight, advantage = advantage.isfinite().to(advantage), advantage.nan_to_num(0.0)
        joint = self._joint(collected, levels)
        for number, level in enumerate(levels):
            matched = self._matched(collected, level, number, joint)
            loss, before = trainer.loss(matched, advantage)
            metrics = {
                "gain": (loss - before).detach(),
                "deviation": output_distance(matched.new, matched.old).detach(),
                "x0_norm": collected.x0.square().flatten(1).mean(1),
            }
            pulls = ((trainer.kl, trainer.recent_kl), (matched.base, matched.recent))
            for name, factor, pred in zip(("kl", "kl_ema"), *pulls, strict=True):
                if pred is not None:
                    distance = trainer.pull(matched.new, pred)
                    loss = loss + factor * trainer.kl_scale(flow_sigma(level)) * distance
                    metrics[name] = distance.detach()
            yield weight * loss / len(levels), metrics

    def _joint(self, collected: Collected, levels: Sequence[Level]) -> Tensor | None:
        """Return the mean log-ratio over all levels [B], where the trainer needs it."""
        if not self.trainer.joint or len(levels) == 1:
            return None
        if _unchanged(self.old):
            return torch.zeros(len(collected.rows)).to(collected.x0)
        ratios = []
        with torch.no_grad():
            for number, level in enumerate(levels):
                matched = self._matched(collected, level, number, None, based=False)
                ratios.append(self.trainer.log_ratio(matched))
        return torch.stack(ratios).mean(0)

    def _matched(
        self,
        collected: Collected,
        level: Level,
        number: int,
        joint: Tensor | None,
        based: bool = True,
    ) -> Matched:
        """Noise the samples to a level and predict; the reference weights come first.

        They are put in place of the trained ones, which must not happen between the forward and
        the backward pass of those.
        """
        x0 = collected.x0
        eps = Noise(collected.run.snapshot.seeds).draw(number, x0, "renoise")
        x = level.alpha * x0 + level.sigma * eps
        names = ("old", *(("recent",) if based and self.trainer.recent_kl else ()))
        averages = {name: self.session.trainable.averages[name] for name in names}
        known: dict[str, Prediction] = {}
        for name, average in averages.items():
            if not _unchanged(average):
                known[name] = self._reference(collected, x, level, average.in_place())
        base = None
        if based and self.trainer.kl:
            base = self._reference(collected, x, level, self.session.reference())
        new = self._predict(collected, x, level)
        for name in averages:
            known.setdefault(name, _detached(new))
        return Matched(new, known["old"], base, x0, eps, level, joint, known.get("recent"))

    def _reference(
        self, collected: Collected, x: Tensor, level: Level, place: AbstractContextManager[None]
    ) -> Prediction:
        with torch.no_grad(), place:
            return _detached(self._predict(collected, x, level))

    def _predict(self, collected: Collected, x: Tensor, level: Level) -> Prediction:
        run = collected.run
        rule = run.rule if self.trainer.train_rule == "sampling" else None
        return predict_at(self.session, run.cond, run.snapshot.seeds, x, level, rule)


def predict_at(
    session: Session,
    cond: Cond,
    seeds: tuple[int, ...],
    x: Tensor,
    level: Level,
    rule: Guidance | None = None,
) -> Prediction:
    """Predict at a level by a rule, every sample as at the first step of a run.

    Without a rule only the conditional branch is evaluated.
    """
    asked = rule or registry.build("guidance", "none")
    start = Snapshot(0, x, (), asked.start(cond), seeds, (0,) * len(x))
    return session.engine.predict(start, Span(0, level, level), cond, asked)[0]


def _unchanged(average: Average) -> bool:
    """Return True where the trained weights are those of an average, as in a first step."""
    return all(torch.equal(average.parameters[k], v) for k, v in average.values.items())


def _detached(pred: Prediction) -> Prediction:
    """Return a prediction with the same values, evaluated, without graph."""
    out = settle(pred.out).detach()
    return Prediction.of(pred.kind, settle(pred.x).detach(), out, pred.level)
