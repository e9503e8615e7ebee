"""Contexts in which strategies are completed before a run of `generate`.

`SamplerBase.bind` and `GuidanceBase.bind` receive them before the network is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sampler.core.adapter import PipelineAdapter
from sampler.types import Level, Sampler


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
