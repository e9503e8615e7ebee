"""Preparation of a distillation: noise levels, samples, and refusals."""

from __future__ import annotations

from collections.abc import Sequence

from sampler.core.noise import initial
from sampler.core.schedule import Schedule
from sampler.training.f_distill.heads import ProbeInput
from sampler.training.session import Session
from sampler.training.time_shares import time_of
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


def check_teacher(session: Session, warmup: bool) -> None:
    """Raise ValueError for a rule that cannot be distilled, or a sampler that cannot be learnt."""
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
