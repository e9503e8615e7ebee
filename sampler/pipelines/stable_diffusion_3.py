"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5 beside the image's patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer
from sampler.types import Cond, Level


@adapter("StableDiffusion3Pipeline")
class StableDiffusion3(FlowTransformer):
    """Velocity prediction at times 0..1000, with a pooled text embedding.

    Skip-layer guidance of the stock pipeline (SD 3.5 medium) is not supported.
    """

    max_shift = 1.16
    text_tokens = (("tokenizer", 0), ("tokenizer_3", 77))  # CLIP's states come first

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        states, uncond, pooled, uncond_pooled = self.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=list(negative) if guided else None,
        )
        cond = {"encoder_hidden_states": states, "pooled_projections": pooled}
        if not guided:
            return Cond(cond)
        return Cond(cond, {"encoder_hidden_states": uncond, "pooled_projections": uncond_pooled})

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        time = self.row_times(level, x)
        return self.networks[model](x, timestep=time, return_dict=False, **cond)[0]
