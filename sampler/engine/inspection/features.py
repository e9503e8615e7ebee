"""Features of a diffusion model: pooled outputs of its blocks at one noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.batch import DEFAULT_BATCH
from sampler.core.errors import UsageError
from sampler.core.images import as_images
from sampler.core.loop import Loop
from sampler.core.noise import initial
from sampler.core.schedule import Schedule
from sampler.core.word_maps import token_grid
from sampler.registry.constraints import as_float, as_int
from sampler.types import Level


def level_at(schedule: Schedule, share: float) -> Level:
    """Level at a share 0..1 of the training times: 0.15 of 1000 is t = 149.

    At 0 there is no noise (alpha = 1, sigma = 0) and the network receives the smallest time. Raises
    ValueError outside 0..1.
    """
    if not 0 <= as_float(share, "t") <= 1:
        raise ValueError(f"t = {share} must lie in 0..1, a share of the training times.")
    if schedule.process == "edm":
        grid = schedule.grid(1000)
        found = grid[max(0, 999 - round(share * 999))]
    elif schedule.process == "flow":
        found = schedule.level(share * schedule.train_steps)
    else:
        found = schedule.level(max(0, round(share * schedule.train_steps) - 1))
    return found if share else Level(found.t, 1.0, 0.0)


def default_block(adapter: PipelineAdapter) -> str:
    """The early decoder block of UNets, the middle block of transformers."""
    blocks = adapter.blocks[1:]
    return "up.0" if "up.0" in blocks else blocks[len(blocks) // 2]


def check_adapter(engine: Loop, what: str) -> PipelineAdapter:
    """The adapter of an engine for images. Raises UsageError for hosted pipelines and videos."""
    adapter = engine.pipeline
    if engine.hosted or adapter.frames is not None:
        kind = "hosted: its own call runs" if engine.hosted else "a video pipeline"
        raise UsageError(
            f"{what} needs a pipeline with an adapter for images, and "
            f"{type(adapter.pipe).__name__} is {kind}."
        )
    return adapter


@torch.no_grad()
def features(
    engine: Loop,
    images: Tensor,
    t: float = 0.15,
    blocks: Sequence[str] | None = None,
    pool: int = 2,
    prompt: str = "",
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Features {block: [B, C·pool²]} of images [B, 3, H, W]; see `Engine.features`."""
    adapter = check_adapter(engine, "features")
    chosen = (default_block(adapter),) if blocks is None else tuple(blocks)
    level, pool = level_at(adapter.schedule, t), as_int(pool, "pool")
    cut = DEFAULT_BATCH if batch_size is None else as_int(batch_size, "batch_size")
    if pool < 1 or cut < 1:
        raise ValueError(f"pool = {pool} and batch_size = {cut} must be at least 1.")
    images = as_images(images)
    size = adapter.size(*images.shape[-2:])
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for part in images.split(cut):
        with adapter.exclusive(), adapter.recording(chosen) as seen:
            z = adapter.latents_of(part)
            raw_output(adapter, noised(z, level, seed), level, prompt, size)
        for name in chosen:
            found[name].append(pooled(seen.blocks[name][0], pool, z.shape[-2:]).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def noised(z: Tensor, level: Level, seed: int) -> Tensor:
    """alpha·z + sigma·n with the first noise of one seed for every image."""
    noise = initial([seed], tuple(z.shape[1:])).to(z)
    return level.alpha * z + level.sigma * noise


def raw_output(
    adapter: PipelineAdapter, x: Tensor, level: Level, prompt: str, size: tuple[int, int]
) -> Tensor:
    """Raw output of the network at x for one prompt; a class model's "" is its null class."""
    cond = conditions_of(adapter, prompt, len(x), size)
    denoiser: Any = adapter
    return denoiser.forward(x, level, cond, "main")


def conditions_of(
    adapter: PipelineAdapter, prompt: str, count: int, size: tuple[int, int]
) -> object:
    """The conditions of `count` rows with one prompt."""
    if adapter.takes_classes and not prompt:
        return adapter.encode(["0"] * count, [""] * count, True, size).uncond
    return adapter.encode([prompt] * count, [""] * count, False, size).cond


def pooled(values: Tensor, pool: int, size: Sequence[int]) -> Tensor:
    """Means over pool x pool cells [B, C·pool²] of maps [B, C, h, w] or tokens [B, N, C]."""
    if values.ndim == 3:
        rows, columns = token_grid(values.shape[1], (size[0], size[1]))
        values = values.transpose(1, 2).unflatten(2, (rows, columns))
    return F.adaptive_avg_pool2d(values.float(), pool).flatten(1)
