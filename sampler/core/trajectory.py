"""Start of a run: prompts and seeds to conditions, bound rule and first snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sampler import registry
from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import GuidanceContext
from sampler.core.caches import beside_caches
from sampler.core.images import start_from
from sampler.core.loop import Loop
from sampler.core.noise import initial
from sampler.types import Cond, Guidance, Level, Sampler, Snapshot


class Run(NamedTuple):
    """Trajectory of B samples; `engine.steps(*run)` and `engine.run_to_end(*run)` walk it.

    levels: the grid as the sampler walks it.
    """

    snapshot: Snapshot
    levels: tuple[Level, ...]
    cond: Cond
    method: Sampler
    rule: Guidance


@torch.no_grad()
def begin(
    engine: Loop,
    prompts: Sequence[str],
    negative: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    size: tuple[int, int],
    method: Sampler,
    rule: Guidance,
    cond: Cond | None = None,
    clean: tuple[Tensor, float] | None = None,
) -> Run:
    """Encode B prompts and draw the first noise; no network but the text encoders is called.

    cond: the encoded prompts, where the caller has them. clean: latents x0 [B, ...] and the
    strength of the noise to start from (see `start_from`). At strength 0 the run has no steps.
    """
    adapter = engine.pipeline
    grid = adapter.grid(steps, size)
    x = first_noise(adapter, seeds, grid, size)
    if clean is not None:
        x, grid = start_from(clean[0], grid, clean[1], seeds)
    levels = method.levels(grid)[:-1] if len(grid) > 1 else ()
    rule, cond = conditions(adapter, prompts, negative, size, method, rule, levels, cond)
    return Run(*engine.start(x, grid, cond, method, rule, seeds), cond, method, rule)


def conditions(
    adapter: PipelineAdapter,
    prompts: Sequence[str],
    negative: Sequence[str],
    size: tuple[int, int],
    method: Sampler,
    rule: Guidance,
    levels: Sequence[Level],
    cond: Cond | None = None,
) -> tuple[Guidance, Cond]:
    """Bind a rule to B prompts; encode them unless `cond` is given. levels: those evaluated."""
    if cond is None:
        cond = adapter.encode(prompts, negative, "uncond" in rule.needs, size)
    spec = registry.spec_of(method)
    context = GuidanceContext(adapter, list(prompts), list(negative), spec, levels, size)
    rule = beside_caches(rule, [getattr(adapter, "network", None)])
    return rule.bind(context, cond)


def first_noise(
    adapter: PipelineAdapter, seeds: Sequence[int], grid: tuple[Level, ...], size: tuple[int, int]
) -> Tensor:
    """Noise [B, ...] at the first level of a grid, on the adapter's device, float32."""
    x = initial(seeds, adapter.latent_shape(*size)).to(adapter.device)
    return x * adapter.schedule.initial_scale(grid)
