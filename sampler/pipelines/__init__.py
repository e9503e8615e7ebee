"""Adapters over diffusers pipelines, one file per family. A new one is a file and a line here."""

from sampler.pipelines import pixart, stable_diffusion, stable_diffusion_xl
from sampler.pipelines.base import Adapter, adapt, adapter, supported

__all__ = [
    "Adapter",
    "adapt",
    "adapter",
    "pixart",
    "stable_diffusion",
    "stable_diffusion_xl",
    "supported",
]
