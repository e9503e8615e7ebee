"""Completion of strategies before a run of `generate`.

A strategy with a method `bind` receives the context of the run before the network is called, and
returns itself completed (with a classifier, the conditions of further classes, a calibrated
number), or raises ValueError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sampler.core.adapter import PipelineAdapter
from sampler.types import Cond, Guidance, Level, Sampler

if TYPE_CHECKING:
    from sampler.core.schedule import Schedule


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


@runtime_checkable
class BindableGuidance(Protocol):
    """Rule that completes itself for a run."""

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Guidance, Cond]: ...


@runtime_checkable
class BindableSampler(Protocol):
    """Sampler that completes itself for a run."""

    def bind(self, context: SamplerContext) -> Sampler: ...


@runtime_checkable
class ScheduledSampler(Protocol):
    """Sampler that evaluates at levels between those of the grid."""

    def with_schedule(self, schedule: Schedule) -> Sampler: ...


def bind_guidance(rule: Guidance, context: GuidanceContext, cond: Cond) -> tuple[Guidance, Cond]:
    """Return the rule and the conditions to run with; unchanged for a rule without `bind`."""
    return rule.bind(context, cond) if isinstance(rule, BindableGuidance) else (rule, cond)


def bind_sampler(method: Sampler, context: SamplerContext) -> Sampler:
    """Return the sampler to run with. Raises ValueError for a grid that it cannot walk."""
    bound = method.bind(context) if isinstance(method, BindableSampler) else method
    bound.levels(tuple(context.levels))
    return bound


def at_schedule(method: Sampler, schedule: Schedule) -> Sampler:
    """Return the sampler with the times of its middle levels; unchanged for one without them."""
    return method.with_schedule(schedule) if isinstance(method, ScheduledSampler) else method


def model_name(adapter: PipelineAdapter) -> str:
    """Name an adapter's weights, and its levels where they are not the pipeline's own."""
    levels = f"+{adapter.levels}" if adapter.levels else ""
    return fingerprint(adapter.network) + levels


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
