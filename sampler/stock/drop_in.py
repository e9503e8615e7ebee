"""Registered samplers as diffusers schedulers, for stock pipelines.

pipe.scheduler = sampler.scheduler("ghvb", pipe.scheduler)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from sampler import registry
from sampler.core.stock_schedule import schedule_of
from sampler.samplers.aliases import named
from sampler.stock.over_alpha import OverAlpha, computes_over_alpha
from sampler.stock.own_timesteps import CascadeScheduler, ClosedScheduler, LatentConsistency
from sampler.stock.scheduler import SamplerScheduler
from sampler.stock.steps_back import StepsBack
from sampler.types import Sampler

# Drop-ins of stock schedulers whose pipelines ask for more than the common interface.
_CLASSES: Mapping[str, type[SamplerScheduler]] = {
    "LCMScheduler": LatentConsistency,
    "SCMScheduler": ClosedScheduler,
    "DDPMWuerstchenScheduler": CascadeScheduler,
    "EDMEulerScheduler": StepsBack,
}


def is_exact_on_flow_maps(method: Sampler) -> bool:
    """Return True if a sampler's step is x' = x − (sigma − sigma')·velocity, of one answer."""
    return method.name == "ddim" and not method.stochastic


def scheduler(sampler: Any, base: Any, grid: Any = None) -> SamplerScheduler:
    """Build a scheduler from a sampler (name, {"name": ..., field: ...} or instance).

    base: the scheduler it replaces. grid: the levels instead of its own, see `Schedule.grid`; a
    pipeline that passes sigmas gives their number only.

    Raises ValueError for a base whose levels are not supported, for a grid that they do not have,
    and for a sampler that a stock pipeline cannot run: one that starts from an x of its own
    (reddiff), or that cannot be written into a configuration file. Warns of samplers that take the
    mean velocity of a flow map's step for the velocity at its start.
    """
    found = replaced(sampler, base, grid)
    flow_map = found.config["base"].get("_class_name") == "FlowMapEulerDiscreteScheduler"
    if flow_map and not is_exact_on_flow_maps(found.method):
        warnings.warn(
            f"A flow map answers with the mean velocity of a step, which {found.method.name} takes "
            "for that at its start; call the pipeline with use_mean_velocity=False, or use 'ddim'.",
            stacklevel=2,
        )
    return found


def replaced(sampler: Any, base: Any, grid: Any = None) -> SamplerScheduler:
    """Build a scheduler as `scheduler` does, without its warning."""
    name = type(base).__name__
    config = {**base.config, "_class_name": name}
    if isinstance(base, SamplerScheduler):
        config, grid = base.config["base"], grid or base.config["grid"]
        name = str(config.get("_class_name", ""))
    sampler, said = named(sampler)
    grid = said if grid is None else grid
    spec = registry.spec_of(registry.build("sampler", sampler))
    try:
        plain = json.loads(json.dumps({"sampler": spec, "base": dict(config), "grid": grid}))
    except TypeError as error:
        raise ValueError(
            f"{spec['name']} in a pipeline must be plain data, to be saved with it: {error}."
        ) from None
    if computes_over_alpha(schedule_of(plain["base"], name)):
        return OverAlpha(**plain)
    return _CLASSES.get(name, SamplerScheduler)(**plain)
