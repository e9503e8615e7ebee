"""Adapters over diffusers pipelines, one module per family."""

from sampler.pipelines import (
    aura_flow,
    consistency_model,
    dit,
    flux,
    flux2,
    hunyuan_dit,
    kolors,
    lumina2,
    pixart,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    unconditional,
    wan,
    z_image,
)
from sampler.pipelines.base import Adapter
from sampler.pipelines.families import adapt, adapter, supported

__all__ = [
    "Adapter",
    "adapt",
    "adapter",
    "aura_flow",
    "consistency_model",
    "dit",
    "flux",
    "flux2",
    "hunyuan_dit",
    "kolors",
    "lumina2",
    "pixart",
    "qwen_image",
    "sana",
    "stable_diffusion",
    "stable_diffusion_3",
    "stable_diffusion_xl",
    "unconditional",
    "wan",
    "z_image",
    "supported",
]
