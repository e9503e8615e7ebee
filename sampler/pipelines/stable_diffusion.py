"""Stable Diffusion 1.x and 2.x, and everything of the same signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.base import Adapter, adapter
from sampler.types import Cond, Level


@adapter("StableDiffusionPipeline")
class StableDiffusion(Adapter):
    """UNet with cross-attention on the text encoder's states; eps- or v-prediction."""

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        cond, uncond = self.pipe.encode_prompt(
            list(prompts),
            self.device,
            1,
            guided,
            negative_prompt=list(negative) if guided else None,
        )
        return Cond(
            {"encoder_hidden_states": cond},
            {"encoder_hidden_states": uncond} if guided else None,
        )

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        network = self.networks[model]
        return network(x, self.time(level, x), return_dict=False, **cond)[0]
