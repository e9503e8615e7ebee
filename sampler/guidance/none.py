"""No guidance: the conditional prediction alone."""

from __future__ import annotations

from dataclasses import dataclass

from sampler.registry import register
from sampler.types import GuidanceBase


@register("guidance", "none")
@dataclass(frozen=True)
class Unguided(GuidanceBase):
    """The conditional prediction, unchanged: g = c. One evaluation per step."""
