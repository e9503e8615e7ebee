"""The schedule of a stock scheduler of any class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sampler.core.consistency_schedule import ConsistencySchedule
from sampler.core.flow_schedules import flow_schedule
from sampler.core.schedule import Schedule


def schedule_of(config: Mapping[str, Any], scheduler: str) -> Schedule:
    """Read a stock scheduler as `Schedule.from_config` does, or by one of its subclasses.

    Those are for schedulers of pipelines that no adapter is for, and of consistency models.
    """
    if scheduler == "CMStochasticIterativeScheduler":
        return ConsistencySchedule.consistency(config)
    base: Any = config.get("base")
    if base is not None:  # our drop-in
        return schedule_of(base, str(base.get("_class_name", "")))
    return flow_schedule(config, scheduler) or Schedule.from_config(config, scheduler)
