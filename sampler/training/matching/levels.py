"""Noise levels at which clean latents are noised again: K strata of one law per update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sampler.core.errors import UsageError
from sampler.training.times import LogitNormal
from sampler.types import Level

if TYPE_CHECKING:
    from sampler.core.schedule import Schedule
    from sampler.training.batches import Batch
    from sampler.training.session import Session

Law = Literal["grid", "uniform", "logit_normal"]


def matching_levels(
    session: Session,
    batch: Batch,
    law: Law,
    count: int,
    shift: float,
    low: float,
    high: float,
) -> list[Level]:
    """Draw the levels of an update, equal for all samples and processes.

        p_k = (k + u_k)/K, u_k uniform;   f = p_k, or sigmoid(normal quantile of p_k)
        f ← low + (high − low)·f,   sigma = 1 − f,   sigma ← shift·sigma/(1 + (shift − 1)·sigma)

    f is the share of the way from noise to image. "grid": the sampler's own levels whose index
    divided by their number is in low..high, one of each stratum. sigma is the level of a flow; a
    variance-preserving model gets the one of the same ratio sigma/(1 − sigma).
    """
    draw, schedule = batch.random("levels"), session.pipeline.schedule
    shares = [(k + draw.random()) / count for k in range(count)]
    if law == "grid":
        chosen = grid_levels(session, low, high)
        return [chosen[int(p * len(chosen))] for p in shares]
    if law == "logit_normal":
        shares = [LogitNormal().share(p, batch.progress, schedule) for p in shares]
    sigmas = [1 - (low + (high - low) * f) for f in shares]
    return [level_at(schedule, shift * s / (1 + (shift - 1) * s)) for s in sigmas]


def grid_levels(session: Session, low: float, high: float) -> list[Level]:
    """Return the evaluated levels of a run in low..high. Raises UsageError for none."""
    grid = session.pipeline.grid(session.steps, session.size)
    levels = session.method.levels(grid)[:-1]
    chosen = [level for i, level in enumerate(levels) if low <= i / len(levels) <= high]
    if not chosen:
        raise UsageError(
            f"No level of the {len(levels)} steps lies in low = {low:g} to high = {high:g}; widen "
            "the range."
        )
    return chosen


def level_at(schedule: Schedule, sigma: float) -> Level:
    """Return the level of a model with the ratio of noise to signal of a flow level sigma."""
    if schedule.process == "flow":
        return schedule.level(schedule.train_steps * sigma)
    if sigma >= 1:
        return schedule.level(schedule.train_steps - 1)
    return schedule.level(schedule.time_of(sigma / (1 - sigma)))


def flow_sigma(level: Level) -> float:
    """Return the flow level with the ratio of noise to signal of a level."""
    return level.sigma / (level.alpha + level.sigma)
