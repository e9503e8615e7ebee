"""Stable Diffusion XL: two text encoders, a pooled embedding and size conditioning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.stable_diffusion import UNetAdapter
from sampler.types import Cond


@adapter("StableDiffusionXLPipeline")
class StableDiffusionXL(UNetAdapter):
    """Stable Diffusion with `text_embeds` (pooled) and `time_ids`.

    time_ids = (height, width, 0, 0, height, width): original and target size of the image, crop at
    the corner, the defaults of the stock pipeline. With `force_zeros_for_empty_prompt` an empty
    negative prompt becomes the zero embedding (the stock pipeline does that for None only, and
    encodes an explicit "").
    """

    takes_weights = True
    text_tokens = (("tokenizer", 0), ("tokenizer_2", 0))  # either may be missing

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        zeros = [self.pipe.config.force_zeros_for_empty_prompt and not text for text in negative]
        cond, uncond, pooled, uncond_pooled = self.encode_prompt(
            self.plain(prompts),
            device=self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=None if not guided or all(zeros) else self.plain(negative),
        )
        cond = self.reweighted(cond, prompts)
        if guided and not all(zeros):
            uncond = self.reweighted(uncond, negative)
        time_ids = torch.tensor([[*size, 0, 0, *size]] * len(prompts), dtype=cond.dtype)
        time_ids = time_ids.to(self.device)
        if not guided:
            return self.with_scale(Cond(branch(cond, pooled, time_ids)))
        keep = ~torch.tensor(zeros, device=self.device)
        uncond, uncond_pooled = uncond * keep[:, None, None], uncond_pooled * keep[:, None]
        return self.with_scale(
            Cond(branch(cond, pooled, time_ids), branch(uncond, uncond_pooled, time_ids))
        )

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            # it overflows in float16; a copy, since the pipeline is not modified
            vae = copy.deepcopy(vae).float()
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return self.pixels(vae, latents / config.scaling_factor)
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        return self.pixels(vae, latents * std / config.scaling_factor + mean)


def branch(states: Tensor, pooled: Tensor, time_ids: Tensor) -> dict[str, Any]:
    return {
        "encoder_hidden_states": states,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
    }
