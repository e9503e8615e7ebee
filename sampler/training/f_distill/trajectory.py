"""Trajectories of a student: how its steps follow on each other, and how a step is matched.

tau_K > ... > tau_1    levels at which the student is evaluated;   tau_0: the end of a run
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from sampler.core.noise import Noise
from sampler.objectives import (
    denoising_error,
    fake_score_loss,
    mixed_noise,
    renoised,
    student_loss,
)
from sampler.training.f_distill.fields import TimeRange
from sampler.training.f_distill.losses import matching_loss
from sampler.types import Level, Prediction

CLEAN = Level(0, 1.0, 0.0)


class StudentSample(NamedTuple):
    """Estimates of a step of the student, [B, ...], with the graph of its evaluation.

    x0, eps: its estimates; mid: the sample at level `level` that noise is added to.
    """

    x0: Tensor
    eps: Tensor
    mid: Tensor
    level: Level

    def noised(self, now: Level, noise: Tensor) -> Tensor:
        """Return the sample at the noisier levels `now` (tensors [B])."""
        return renoised(self.mid, self.level, now, noise)


class StudentTrajectory(Protocol):
    """Order of a student's steps, 0 the first, and what is matched at each.

    next: x at the level `after`, from the prediction of a step. sampled: the sample of a step.
    times_of: the range of t at a step, as fractions of the training times; above: the part of a
    range that the sample of a step can be noised to. student_loss: of matching [B]; guided, fake:
    estimates of x0; h [B]: weights. fake_loss: of the fake score's prediction at level `now`, [B].
    """

    @property
    def levels(self) -> tuple[Level, ...]: ...
    def next(self, pred: Prediction, after: Level, seeds: tuple[int, ...], step: int) -> Tensor: ...
    def sampled(self, pred: Prediction, step: int) -> StudentSample: ...
    def times_of(self, step: int) -> TimeRange: ...
    def above(self, times: TimeRange, step: int) -> TimeRange: ...
    def student_loss(
        self, made: StudentSample, guided: Tensor, fake: Tensor, h: Tensor
    ) -> Tensor: ...
    def fake_loss(
        self, pred: Prediction, made: StudentSample, now: Level, noise: Tensor
    ) -> Tensor: ...


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
        x0 = pred.x0.tensor()
        return after.alpha * x0 + after.sigma * Noise(seeds).draw(step, x0)

    def sampled(self, pred: Prediction, step: int) -> StudentSample:
        x0 = pred.x0.tensor()
        return StudentSample(x0, pred.eps.tensor(), x0, CLEAN)

    def times_of(self, step: int) -> TimeRange:
        return self.times

    def above(self, times: TimeRange, step: int) -> TimeRange:
        return times

    def student_loss(self, made: StudentSample, guided: Tensor, fake: Tensor, h: Tensor) -> Tensor:
        return matching_loss(made.x0, guided, fake, h)

    def fake_loss(self, pred: Prediction, made: StudentSample, now: Level, noise: Tensor) -> Tensor:
        return denoising_error(pred, made.x0, noise)


@dataclass(frozen=True)
class Own:
    """The student's own deterministic run: x0 and eps of one evaluation, and no fresh noise.

        x at tau_{k−1} = alpha·D + sigma·eps
        x_t = (alpha_t/alpha)·x + sqrt(sigma_t² − (alpha_t/alpha)²·sigma²)·n     t above tau_{k−1}

    The samples of every step are matched along the whole trajectory: the student's loss is
    `objectives.student_loss` on D times h, the fake score's `objectives.fake_score_loss`.

    levels, times: as in `Renoised`; end: tau_0; floors, tops: tau_{k−1} and tau_k of every step as
    fractions of the training times; separate: t stays below tau_k; huber: c of the pseudo-Huber
    loss, None for the squared one.
    Source: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al.,
    2025), arXiv:2503.06674.
    """

    levels: tuple[Level, ...]
    times: TimeRange
    end: Level
    floors: tuple[float, ...]
    tops: tuple[float, ...]
    separate: bool
    huber: float | None

    def next(self, pred: Prediction, after: Level, seeds: tuple[int, ...], step: int) -> Tensor:
        return (after.alpha * pred.x0 + after.sigma * pred.eps).tensor()

    def sampled(self, pred: Prediction, step: int) -> StudentSample:
        after = (*self.levels, self.end)[step + 1]
        mid = self.next(pred, after, (), step)
        return StudentSample(pred.x0.tensor(), pred.eps.tensor(), mid, after)

    def times_of(self, step: int) -> TimeRange:
        low, high = self.above(self.times, step)
        return low, min(high, self.tops[step]) if self.separate else high

    def above(self, times: TimeRange, step: int) -> TimeRange:
        return max(times[0], self.floors[step]), times[1]

    def student_loss(self, made: StudentSample, guided: Tensor, fake: Tensor, h: Tensor) -> Tensor:
        return h * student_loss(made.x0, guided, fake, self.huber)

    def fake_loss(self, pred: Prediction, made: StudentSample, now: Level, noise: Tensor) -> Tensor:
        mixed = mixed_noise(made.eps, noise, made.level, now)
        return fake_score_loss(pred.x0.tensor(), made.x0, now, mixed, noise)
