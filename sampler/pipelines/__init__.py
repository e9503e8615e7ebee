"""Adapters over diffusers pipelines, one file per family. A new one is a file and a line here."""

from sampler.pipelines import stable_diffusion
from sampler.pipelines.base import Adapter, adapt, adapter, supported

__all__ = ["Adapter", "adapt", "adapter", "stable_diffusion", "supported"]
