"""Qwen-Image: the states of a vision-language model beside packed 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer
from sampler.types import Cond, Level


@adapter("QwenImagePipeline")
class QwenImage(FlowTransformer):
    """Velocity prediction at times 0..1 on packed tokens; texts of any length, with a mask.

    Latents are [C, h/2, 2, w/2, 2]: those of [C, h, w] with axes for the patches, so that a rule
    can measure norms per token, as the stock pipeline does after its guidance (`cfg` with
    match_norm = (1, 3, 5)).
    """

    scale_argument = "true_cfg_scale"

    def stock_times(self, steps: int) -> list[float] | None:
        return self.linear_times(steps)

    @property
    def patch(self) -> int:
        return 2

    @property
    def native(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size
        return side, side

    @property
    def default_guidance(self) -> dict[str, Any]:
        if self._embeds:
            return super().default_guidance
        return {"name": "cfg", "scale": self.default_scale, "match_norm": [1, 3, 5]}

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        rows, cols = height // self.factor // 2, width // self.factor // 2
        return (self.network.config.in_channels // 4, rows, 2, cols, 2)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        return self.branches(self._texts(prompts), self._texts(negative) if guided else None)

    def _texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        states, mask = self.encode_prompt(list(texts), device=self.device)
        mask = states.new_ones(states.shape[:2]) if mask is None else mask
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask.bool()}

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        count, channels, rows, _, cols, _ = x.shape
        tokens = self.scaled(x, level).permute(0, 2, 4, 1, 3, 5).reshape(count, rows * cols, -1)
        out = self.networks[model](
            tokens,
            timestep=self.row_times(level, x).to(tokens.dtype) / 1000,
            img_shapes=[[(1, rows, cols)]] * count,
            return_dict=False,
            **cond,
        )[0]
        return out.view(count, rows, cols, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)

    def decode(self, latents: Tensor) -> Tensor:
        return self.video_pixels(latents.flatten(4, 5).flatten(2, 3)[:, :, None])[:, :, 0]

    def latents_of(self, images: Tensor) -> Tensor:
        latents = self.video_latents(images[:, :, None])[:, :, 0]
        count, channels, height, width = latents.shape
        return latents.view(count, channels, height // 2, 2, width // 2, 2)
