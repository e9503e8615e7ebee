"""Checks of strategies before a run, and the contexts in which `bind` completes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sampler.core.adapter import PipelineAdapter
from sampler.types import Cond, Guidance, Level, Sampler


@dataclass(frozen=True)
class GuidanceContext:
    """Run of one batch, for a rule: B prompts and negative prompts, sampler spec, levels and size.

    levels: the grid without its last level, which is never evaluated; size: (height, width).
    """

    adapter: PipelineAdapter
    prompts: Sequence[str]
    negative: Sequence[str]
    sampler: Mapping[str, Any]
    levels: Sequence[Level]
    size: tuple[int, int]

    def fingerprint(self) -> str:
        """Name of the adapter's weights and levels; see `model_name`."""
        return model_name(self.adapter)


@dataclass(frozen=True)
class SamplerContext:
    """Run of a sampler: adapter, requested grid, guidance spec, (height, width)."""

    adapter: PipelineAdapter
    levels: Sequence[Level]
    guidance: Mapping[str, Any]
    size: tuple[int, int]

    def fingerprint(self) -> str:
        """Name of the adapter's weights and levels; see `model_name`."""
        return model_name(self.adapter)


def bind_sampler(method: Sampler, context: SamplerContext) -> Sampler:
    """Return the sampler to run with. Raises ValueError for a grid that it cannot walk."""
    bound = method.bind(context)
    bound.levels(tuple(context.levels))
    return bound


def check_rule(rule: Guidance, method: Sampler, cond: Cond, models: Sequence[str]) -> None:
    """Raise ValueError for a rule that lacks a condition or a model, or whose direction is dropped.

    models: names of the denoiser's networks.
    """
    if "uncond" in rule.needs and cond.uncond is None:
        raise ValueError(
            f"Guidance {rule.name!r} needs an unconditional branch: "
            "pass cond=sampler.Cond(cond=..., uncond=...)."
        )
    if missing := rule.needs - {"cond", "uncond", *models}:
        raise ValueError(
            f"Guidance {rule.name!r} needs the model {min(missing)!r}, and this denoiser has "
            f"{', '.join(models)}; give one: sampler.load(weak=...) or denoiser(models=...)."
        )
    if rule.sets_direction and not method.follows_direction:
        raise ValueError(
            f"{rule.name}: {method.name!r} has no place for a direction apart from the target; use "
            "ddim, ab, ghvb or dpmpp_2m."
        )


def model_name(adapter: PipelineAdapter) -> str:
    """Name an adapter's weights, and its levels where they are not the pipeline's own."""
    levels = f"+{adapter.levels}" if adapter.levels else ""
    return network_hash(adapter.network) + levels


def network_hash(network: Any) -> str:
    """Hash a network's parameter names, shapes and first values.

    The values are taken in bfloat16, so that weights loaded in another precision keep their name.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(network.named_parameters()):
        first = value.detach().flatten()[:16].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(value.shape)}{first.tolist()}".encode())
    return digest.hexdigest()[:16]
