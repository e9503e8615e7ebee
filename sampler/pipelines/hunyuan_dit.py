"""HunyuanDiT: states of BERT and of T5, the image's size, and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.base import Adapter
from sampler.pipelines.families import adapter
from sampler.types import Cond, Level

# constants of the stock pipeline
LENGTHS = (77, 256)  # tokens of BERT and of T5
ORIGINAL_SIZE = (1024, 1024)  # micro-conditioning
PIXELS_PER_LATENT = 8  # for token positions


@adapter("HunyuanDiTPipeline")
class HunyuanDiT(Adapter):
    """eps- or v-prediction; the channels of the learned variance are dropped.

    Images have the requested size; `use_resolution_binning` is not supported.
    """

    network_name = "transformer"
    processes = ("vp",)

    @property
    def unit(self) -> int:
        return max(16, self.factor * self.patch)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        branches: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for number, (length, suffix) in enumerate(zip(LENGTHS, ("", "_t5"), strict=True)):
            encoded = self.encode_prompt(
                list(prompts),
                self.device,
                self.dtype,
                1,
                guided,
                negative_prompt=list(negative),
                max_sequence_length=length,
                text_encoder_index=number,
            )
            for branch, states, mask in zip(branches, encoded[:2], encoded[2:], strict=True):
                branch[f"encoder_hidden_states{suffix}"] = states
                branch[f"text_embedding_mask{suffix}"] = mask
        meta = torch.tensor([[*ORIGINAL_SIZE, *size, 0, 0]] * len(prompts), dtype=self.dtype)
        style = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)
        shared = {"image_meta_size": meta.to(self.device), "style": style}
        cond, uncond = ({**branch, **shared} for branch in branches)
        return Cond(cond, uncond if guided else None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        time = self.time(level, x).expand(x.shape[0]).to(x.dtype)
        network = self.networks[model]
        height, width = (
            side * self.factor // PIXELS_PER_LATENT // self.patch for side in x.shape[-2:]
        )
        rotary = _rotary(
            network.inner_dim // network.num_heads, height, width, self.patch, x.device
        )
        out = network(x, time, image_rotary_emb=rotary, return_dict=False, **cond)[0]
        return out[:, : x.shape[1]]


@lru_cache(maxsize=8)
def _rotary(size: int, height: int, width: int, patch: int, device: torch.device) -> Any:
    """Rotary positions of the tokens on the grid of a 512-pixel image, as in the stock pipeline."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import (
        get_resize_crop_region_for_grid,
    )

    base = 512 // PIXELS_PER_LATENT // patch
    crop = get_resize_crop_region_for_grid((height, width), base)
    with torch.inference_mode(False):
        return get_2d_rotary_pos_embed(size, crop, (height, width), device=device, output_type="pt")
