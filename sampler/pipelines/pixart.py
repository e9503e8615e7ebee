"""PixArt Alpha and Sigma: a transformer over patches, T5 with an attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.base import Adapter
from sampler.pipelines.families import adapter
from sampler.types import Cond, Level


@adapter("PixArtAlphaPipeline", "PixArtSigmaPipeline")
class PixArt(Adapter):
    """eps-prediction; the channels of the learned variance are dropped.

    Images have the requested size: `use_resolution_binning` of the stock pipelines, which generates
    the nearest trained size and crops it, is not supported. Captions are cleaned as in the stock
    pipelines where the packages for it (beautifulsoup4, ftfy) are installed.
    """

    network_name = "transformer"

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        cond, mask, uncond, uncond_mask = self.encode_prompt(
            list(prompts),
            guided,
            negative_prompt=list(negative),
            device=self.device,
            clean_caption=_can_clean(),
        )
        added = self._added(len(prompts), size, cond)
        return Cond(
            _branch(cond, mask, added), _branch(uncond, uncond_mask, added) if guided else None
        )

    def _added(self, rows: int, size: tuple[int, int], like: Tensor) -> dict[str, Any]:
        """Resolution [B, 2] and aspect ratio [B, 1], inputs of the 1024-pixel Alpha models."""
        if (
            type(self.pipe).__name__ != "PixArtAlphaPipeline"
            or self.network.config.sample_size != 128
        ):
            return {"resolution": None, "aspect_ratio": None}
        height, width = size
        return {
            "resolution": torch.tensor([[height, width]] * rows).to(like),
            "aspect_ratio": torch.tensor([[height / width]] * rows).to(like),
        }

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        time = self.time(level, x).expand(x.shape[0])
        out = self.networks[model](x, timestep=time, return_dict=False, **cond)[0]
        return out[:, : x.shape[1]]


def _branch(states: Tensor, mask: Tensor, added: dict[str, Any]) -> dict[str, Any]:
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": added,
    }


def _can_clean() -> bool:
    from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

    return is_bs4_available() and is_ftfy_available()
