"""Shares of the training time, 0 (image) to 1 (noise), as times and levels of a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sampler.core.schedule import Schedule
    from sampler.types import Level


def level_of(schedule: Schedule, share: float) -> Level:
    """Return the level at a share of the training time, 0 to 1.

    A variance-preserving model is trained at whole timesteps, floor(N·f).
    """
    return schedule.level(time_of(schedule, share))


def time_of(schedule: Schedule, share: float) -> float:
    """Return the network's time at a share of the training time; 1 is pure noise."""
    if schedule.process == "edm":
        low, high = _edm_times(schedule)
        return low + share * (high - low)
    if schedule.process == "flow":
        return share * schedule.train_steps
    return min(int(share * schedule.train_steps), schedule.train_steps - 1)


def share_of(schedule: Schedule, ratio: float) -> float:
    """Return the share of the training time at which sigma/alpha = ratio, within 0..1."""
    return share_at(schedule, schedule.time_of(ratio))


def share_at(schedule: Schedule, time: float) -> float:
    """Return the share of the training time of a network's time, within 0..1."""
    if schedule.process == "edm":
        low, high = _edm_times(schedule)
        return min(max((time - low) / (high - low), 0.0), 1.0)
    if schedule.process == "flow":
        return time / schedule.train_steps
    return (round(time) + 0.5) / schedule.train_steps  # the middle of its timestep's share


def _edm_times(schedule: Schedule) -> tuple[float, float]:
    """Ends of the time of Karras' schedule."""
    low, high = (schedule.time_of(s or 1.0) for s in (schedule.sigma_min, schedule.sigma_max))
    return low, high
