"""Lumina 2: states of Gemma beside the image's patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer
from sampler.types import Cond, Level


@adapter("Lumina2Pipeline")
class Lumina2(FlowTransformer):
    """Negative velocity prediction at times from 0 (noise) to 1.

    Two quirks of the stock pipeline are kept, since models are used with them: the shift of the
    grid follows the number of latent channels instead of the number of tokens, and the norm of the
    guided output is set to the conditional one's along the last axis of the latents.
    """

    def stock_times(self, steps: int) -> list[float] | None:
        return self.linear_times(steps)

    @property
    def default_guidance(self) -> dict[str, Any]:
        return {"name": "cfg", "scale": self.default_scale, "match_norm": [-1]}

    def tokens(self, size: tuple[int, int]) -> int:
        return self.network.config.in_channels

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        states, mask, uncond, uncond_mask = self.encode_prompt(
            list(prompts), guided, negative_prompt=list(negative), device=self.device
        )
        cond = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        if not guided:
            return Cond(cond)
        return Cond(cond, {"encoder_hidden_states": uncond, "encoder_attention_mask": uncond_mask})

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        time = 1 - self.row_times(level, x) / self.schedule.train_steps
        return -self.networks[model](x, timestep=time, return_dict=False, **cond)[0]
