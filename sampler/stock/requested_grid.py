"""Grid of a run from the arguments of a stock pipeline's `set_timesteps`."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from sampler.core.schedule import Schedule
from sampler.types import Level


def requested_grid(
    schedule: Schedule,
    steps: int | None,
    times: list[float] | None,
    sigmas: list[float] | None,
    mu: float | None,
    spacing: Any = None,
) -> tuple[Level, ...]:
    """Return the levels for `num_inference_steps`, timesteps, sigmas and mu; see `set_timesteps`.

    spacing: the drop-in's own grid; then sigmas give the number of steps only.

    Raises ValueError for lengths that differ, levels that do not fall, timesteps together with
    sigmas on a vp schedule, timesteps together with a grid, rising ones, and what `Schedule.grid`
    raises.
    """
    lengths = {len(values) for values in (times, sigmas) if values is not None}
    if len(lengths | ({int(steps)} if steps is not None else set())) > 1:
        raise ValueError("num_inference_steps, timesteps and sigmas must agree in length.")
    count = lengths.pop() if lengths else int(steps or 0)
    if spacing is not None:
        if times is not None:
            raise ValueError(
                "This scheduler was made with a grid: leave out timesteps, or make it without."
            )
        return schedule.grid(count, spacing=spacing, mu=mu)
    if times is not None and schedule.rising:
        raise ValueError(
            "The timesteps of this scheduler rise to the image (invert_sigmas); give sigmas."
        )
    if times is None:
        grid = schedule.grid(count, mu=mu, sigmas=sigmas)
    elif schedule.process == "flow":
        given = [t / schedule.train_steps for t in times] if sigmas is None else sigmas
        levels = schedule.grid(count, mu=mu, sigmas=given)
        grid = (*(level._replace(t=t) for level, t in zip(levels, times, strict=False)), levels[-1])
    elif sigmas is not None:
        raise ValueError("Give timesteps or sigmas, not both, for this scheduler.")
    else:
        levels = (schedule.level(int(t) if t.is_integer() else t) for t in times)
        grid = (*levels, schedule.grid(1)[-1])
    noise = [level.sigma / level.alpha if level.alpha else math.inf for level in grid[:-1]]
    if any(after >= before for before, after in pairwise(noise)):
        raise ValueError(
            f"timesteps = {[level.t for level in grid[:-1]]} must fall from each to the next, and "
            "so must sigmas."
        )
    return grid
