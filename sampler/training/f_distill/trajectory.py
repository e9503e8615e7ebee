"""Trajectories of a student: how its steps follow on each other, and how a step is matched.

tau_K > ... > tau_1    levels at which the student is evaluated;   tau_0: the end of a run
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sampler.core.noise import Noise
from sampler.objectives import denoising_error, renoised
from sampler.training.f_distill.losses import matching_loss
from sampler.training.f_distill.micro_batch import TimeRange
from sampler.types import Level, Prediction

CLEAN = Level(0, 1.0, 0.0)


class Sampled(NamedTuple):
    """What a step of the student makes, [B, ...], with the graph of its evaluation.

    x0, eps: its estimates; mid: the sample at level `level` that noise is added to.
    """

    x0: Tensor
    eps: Tensor
    mid: Tensor
    level: Level

    def noised(self, now: Level, noise: Tensor) -> Tensor:
        """Return the sample at the noisier levels `now` (tensors [B])."""
        return renoised(self.mid, self.level, now, noise)


@dataclass(frozen=True)
class Renoised:
    """Consistency sampling: every step begins at the last estimate of x0, noised anew.

        x at tau_{k−1} = alpha·D + sigma·z,   z ~ N(0, I)

    The student's estimate D itself is noised to a level t, in one range for all steps, and
    matched as DMD does (`matching_loss`). The fake score's loss is in the network's own
    parametrisation.

    levels: tau_K to tau_1; times: the range of t as fractions of the training times.
    """

    levels: tuple[Level, ...]
    times: TimeRange

    def next(self, pred: Prediction, after: Level, seeds: tuple[int, ...], step: int) -> Tensor:
        """Return x at the level `after`, from the prediction of a step, 0 the first."""
        x0 = pred.x0.tensor()
        return after.alpha * x0 + after.sigma * Noise(seeds).draw(step, x0)

    def sampled(self, pred: Prediction, step: int) -> Sampled:
        """Return the sample of a step, 0 the first."""
        x0 = pred.x0.tensor()
        return Sampled(x0, pred.eps.tensor(), x0, CLEAN)

    def times_of(self, step: int) -> TimeRange:
        """Return the range of t at a step."""
        return self.times

    def student_loss(self, made: Sampled, guided: Tensor, fake: Tensor, h: Tensor) -> Tensor:
        """Return the loss of matching, [B]; guided, fake: estimates of x0; h [B]: weights."""
        return matching_loss(made.x0, guided, fake, h)

    def fake_loss(self, pred: Prediction, made: Sampled, now: Level, noise: Tensor) -> Tensor:
        """Return the loss [B] of the fake score's prediction at level `now`."""
        return denoising_error(pred, made.x0, noise)
