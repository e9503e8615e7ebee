"""Kolors: Stable Diffusion XL's UNet with ChatGLM as text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sampler.pipelines.families import adapter
from sampler.pipelines.stable_diffusion_xl import StableDiffusionXL, branch
from sampler.types import Cond


@adapter("KolorsPipeline")
class Kolors(StableDiffusionXL):
    """SDXL in which an empty negative prompt is encoded like any other."""

    takes_weights = False  # another text encoder

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        cond, uncond, pooled, uncond_pooled = self.encode_prompt(
            list(prompts),
            self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=list(negative),
        )
        time_ids = torch.tensor([[*size, 0, 0, *size]] * len(prompts), dtype=cond.dtype)
        time_ids = time_ids.to(self.device)
        return Cond(
            branch(cond, pooled, time_ids),
            branch(uncond, uncond_pooled, time_ids) if guided else None,
        )
