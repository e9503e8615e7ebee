"""What a strategy may look at before a run of `generate`.

A rule with a method `bind(request, cond) -> (rule, cond)` is given the chance to complete itself
(a classifier, the conditions of further classes) or to refuse, before the network is called; a
sampler with `bind(setting) -> sampler` likewise (a calibrated number, a decoder).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sampler.core.nested import bound
from sampler.types import Level, Sampler


@dataclass(frozen=True)
class Request:
    """One batch to be run: the adapter, B prompts and negative prompts, sampler, levels and size.

    levels: the grid without its last level, which is never evaluated; size: (height, width).
    """

    adapter: Any
    prompts: Sequence[Any]
    negative: Sequence[str]
    sampler: dict[str, Any]
    levels: Sequence[Level]
    size: tuple[int, int]

    def fingerprint(self) -> str:
        """Names the weights of the adapter's network; see `fingerprint`."""
        return fingerprint(self.adapter.network)


@dataclass(frozen=True)
class Setting:
    """What a sampler is to run in: adapter, grid asked for, rule, (height, width)."""

    adapter: Any
    levels: Sequence[Level]
    guidance: dict[str, Any]
    size: tuple[int, int]

    def fingerprint(self) -> str:
        """Names the weights of the adapter's network; see `fingerprint`."""
        return fingerprint(self.adapter.network)


def bound_sampler(method: Sampler, setting: Setting) -> Sampler:
    """The sampler to run with. Raises ValueError for a grid that it cannot walk."""
    bind = getattr(method, "bind", None)
    method = method if bind is None else bind(setting)
    method.levels(tuple(setting.levels))
    return method


def fingerprint(network: Any) -> str:
    """A name for a network's weights: of parameter names, shapes and first values.

    The values are taken in bfloat16, so that the same weights loaded in another precision keep
    their name.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(network.named_parameters()):
        first = value.detach().flatten()[:16].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(value.shape)}{first.tolist()}".encode())
    return digest.hexdigest()[:16]


__all__ = ["Request", "Setting", "bound", "bound_sampler", "fingerprint"]
