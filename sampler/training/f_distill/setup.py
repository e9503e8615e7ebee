"""Preparation of a distillation: noise levels, samples, and refusals."""

from __future__ import annotations

from collections.abc import Sequence

from sampler.core.noise import initial
from sampler.core.schedule import Schedule
from sampler.training.f_distill.fields import DistillFields
from sampler.training.f_distill.heads import ProbeInput
from sampler.training.f_distill.trajectory import Own, Renoised, StudentTrajectory
from sampler.training.session import Session
from sampler.training.time_shares import share_at, time_of
from sampler.types import Level

# Rules that depend on the step or on earlier steps: a single noised image has neither.
_STATEFUL_RULES = ("adaptive", "linear_ag", "gfcg", "student")


def student_levels(timesteps: Sequence[float], schedule: Schedule) -> tuple[Level, ...]:
    """Return the levels at which the student is evaluated, noisy first; () is the noisiest alone.

    Raises ValueError for a time outside the schedule, and for an eps-prediction at alpha = 0,
    which does not determine x0.
    """
    times = timesteps or (time_of(schedule, 1.0),)
    levels = tuple(schedule.level(t) for t in times)
    if schedule.prediction == "eps" and any(level.alpha == 0 for level in levels):
        raise ValueError(
            f"f_distill: an eps-prediction says nothing about x0 at t = {times[0]}; give "
            "timesteps that start lower."
        )
    return levels


def trajectory_of(trainer: DistillFields, session: Session) -> StudentTrajectory:
    """Return the trajectory of a trainer's student.

    Raises ValueError as `student_levels` does, and for a range of times above which no noise can be
    added to a step's samples.
    """
    pipeline = session.pipeline
    schedule, levels = pipeline.schedule, student_levels(trainer.timesteps, pipeline.schedule)
    if trainer.trajectory == "renoised":
        return Renoised(levels, trainer.times)
    end = pipeline.grid(len(levels), session.size)[-1]
    tops = tuple(share_at(schedule, level.t) for level in levels)
    found = Own(levels, trainer.times, end, (*tops[1:], 0.0), tops, trainer.separate, trainer.huber)
    for step, level in enumerate(levels):
        ranges = {"times": found.times_of(step)}
        if trainer.guidance_times is not None:
            ranges["guidance_times"] = found.above(trainer.guidance_times, step)
        for name, (low, high) in ranges.items():
            if low >= high:
                raise ValueError(
                    f"f_distill: {name} leaves no level for the step at t = {level.t:g}, which "
                    f"starts at {low:.4g} of the training times; give a higher end than "
                    f"{high:.4g}, or other timesteps."
                )
    return found


def check_teacher(session: Session, warmup: bool, decoupled: bool) -> None:
    """Raise ValueError for a rule that cannot be distilled, or a sampler that cannot be learnt.

    decoupled: the guidance term has levels of its own.
    """
    rule = session.rule
    if (
        rule.name in _STATEFUL_RULES
        or getattr(rule, "interval", None)
        or getattr(rule, "window", None)
    ):
        raise ValueError(
            f"f_distill: guidance {rule.name!r} depends on the step or on earlier steps, and a "
            "student is trained at single noise levels; use one that does not, such as cfg or apg "
            "without interval and window."
        )
    if decoupled and rule.name == "none":
        raise ValueError(
            "f_distill: guidance_times is of the guidance term, and the guidance 'none' has none; "
            "leave it out, or choose a rule such as cfg."
        )
    if warmup and session.method.stochastic:
        raise ValueError(
            f"f_distill: the warm-up learns images from their noise, and {session.method.name!r} "
            "adds more on the way; use a deterministic sampler, such as ab or ddim."
        )


def feature_probe(session: Session, level: Level, prompt: str) -> ProbeInput:
    """Return an input of one sample that shows the shapes of the teacher's features."""
    pipeline = session.pipeline
    _, cond = session.encode([prompt])
    x = initial([0], pipeline.latent_shape(*session.size)).to(pipeline.device)
    return ProbeInput(x, level, cond.cond)
