"""Contexts in which strategies are bound before a run of `generate`, and keys of calibrations.

`SamplerBase.bind` and `GuidanceBase.bind` complete a strategy from its context (a calibrated
number, a decoder, a classifier) or raise ValueError, before the network is called.
"""

from __future__ import annotations

import hashlib
import math
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
        """Name of the weights of the adapter's network; see `fingerprint`."""
        return fingerprint(self.adapter.network)


@dataclass(frozen=True)
class SamplerContext:
    """Run of a sampler: adapter, requested grid, guidance spec, (height, width)."""

    adapter: PipelineAdapter
    levels: Sequence[Level]
    guidance: Mapping[str, Any]
    size: tuple[int, int]

    def fingerprint(self) -> str:
        """Name of the weights of the adapter's network; see `fingerprint`."""
        return fingerprint(self.adapter.network)


def bind_sampler(method: Sampler, context: SamplerContext) -> Sampler:
    """Return the sampler to run with. Raises ValueError for a grid that it cannot walk."""
    bound = method.bind(context)
    bound.levels(tuple(context.levels))
    return bound


def fingerprint(network: Any) -> str:
    """Hash a network's parameter names, shapes and first values.

    The values are taken in bfloat16, so that weights loaded in another precision keep their name.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(network.named_parameters()):
        first = value.detach().flatten()[:16].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(value.shape)}{first.tolist()}".encode())
    return digest.hexdigest()[:16]


def agree(fitted: Any, found: Any) -> bool:
    """True where two values of a calibration's key are equal, floats to 1e-5.

    Six digits of a level are stored, and schedules are float32 products of a thousand factors,
    which differ between processors.
    """
    if isinstance(fitted, (list, tuple)) and isinstance(found, (list, tuple)):
        return len(fitted) == len(found) and all(map(agree, fitted, found))
    if isinstance(fitted, float) and isinstance(found, float):
        return math.isclose(fitted, found, rel_tol=1e-5, abs_tol=1e-5)
    return fitted == found
