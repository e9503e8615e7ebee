"""The schedule of a stock scheduler of any class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sampler.core.consistency_schedule import ConsistencySchedule
from sampler.core.schedule import Schedule


def schedule_of(config: Mapping[str, Any], scheduler: str) -> Schedule:
    """Read a stock scheduler as `Schedule.from_config` does, or that of a consistency model."""
    if scheduler == "CMStochasticIterativeScheduler":
        return ConsistencySchedule.consistency(config)
    base: Any = config.get("base")
    if base is not None:  # our drop-in
        return schedule_of(base, str(base.get("_class_name", "")))
    return Schedule.from_config(config, scheduler)
