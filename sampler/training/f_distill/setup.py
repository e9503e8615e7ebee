"""What f-distill needs before its first update: times, conditions, samples, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sampler.core.noise import initial
from sampler.core.schedule import Schedule
from sampler.core.trajectory import conditions
from sampler.training.f_distill.data import Samples, data_samples, teacher_samples
from sampler.types import Cond, Guidance, Level

if TYPE_CHECKING:
    from sampler.training.f_distill.trainer import FDistill
    from sampler.training.session import Session
    from sampler.training.settings import Settings

# Rules that decide by step or by what came before: there is neither in one noised image.
_OF_A_RUN = ("adaptive", "linear_ag", "gfcg", "student")


def time_of(schedule: Schedule, share: float) -> float:
    """The training time at a share in 0..1 of all of them; 1 is pure noise."""
    if schedule.process == "edm":  # its times are ln(sigma)/4
        low, high = (math.log(s or 1.0) / 4 for s in (schedule.sigma_min, schedule.sigma_max))
        return low + share * (high - low)
    if schedule.process == "flow":
        return share * schedule.train_steps
    return round(share * (schedule.train_steps - 1))


def student_levels(trainer: FDistill, schedule: Schedule) -> tuple[Level, ...]:
    """The levels that the student is evaluated at, noisy first.

    Raises ValueError for a time outside the schedule, and where the network's output says nothing
    about x0.
    """
    times = trainer.timesteps or (time_of(schedule, 1.0),)
    levels = tuple(schedule.level(t) for t in times)
    if schedule.prediction == "eps" and any(level.alpha == 0 for level in levels):
        raise ValueError(
            f"f_distill: an eps-prediction says nothing about x0 at t = {times[0]}; give "
            "timesteps that start lower."
        )
    return levels


def encoded(session: Session, prompts: Sequence[str]) -> tuple[Cond, Guidance]:
    """The conditions of B prompts, and the teacher's rule bound to them."""
    with torch.no_grad():
        rule, cond = conditions(
            session.engine.pipeline,
            prompts,
            [session.negative] * len(prompts),
            session.size,
            session.method,
            session.rule,
            levels=(),
        )
    return cond, rule


def check_teacher(trainer: FDistill, session: Session) -> None:
    """Raises ValueError for a rule that cannot be baked in, and for what cannot be regressed."""
    rule = session.rule
    if rule.name in _OF_A_RUN or getattr(rule, "interval", None) or getattr(rule, "window", None):
        raise ValueError(
            f"f_distill: guidance {rule.name!r} decides by what came before in a run, and a "
            "student is taught at single noise levels; use one that does not, such as cfg or apg "
            "without interval and window."
        )
    if trainer.warmup and session.method.stochastic:
        raise ValueError(
            f"f_distill: the warm-up learns images from their noise, and {session.method.name!r} "
            "adds more on the way; use a deterministic sampler, such as ab or ddim."
        )
    student_levels(trainer, session.engine.pipeline.schedule)


def probe(trainer: FDistill, session: Session, prompt: str) -> tuple[Any, Level, Any]:
    """(x [1, ...], level, cond) of one row, for the shapes of features."""
    pipeline = session.engine.pipeline
    cond, _ = encoded(session, [prompt])
    x = initial([0], pipeline.latent_shape(*session.size)).to(pipeline.device)
    return x, student_levels(trainer, pipeline.schedule)[0], cond.cond


def samples_of(
    trainer: FDistill, session: Session, prompts: list[str], out: Path, settings: Settings
) -> tuple[Samples | None, Samples | None]:
    """(samples for the discriminator, pairs for the warm-up); made where they are not there yet.

    Raises ValueError for a prompt without a sample.
    """
    own = None
    if trainer.needs_samples:
        precision, folder = settings.mixed_precision, out / "teacher"
        own = teacher_samples(session, prompts, trainer.samples, settings.seed, folder, precision)
    real = own
    if trainer.gan_weight and trainer.data is not None:
        real = data_samples(session, trainer.data, out / "data.safetensors")
    if trainer.gan_weight and real is not None:
        real.check(prompts)
    return real if trainer.gan_weight else None, own if trainer.warmup else None
