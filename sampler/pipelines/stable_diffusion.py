"""Stable Diffusion 1.x and 2.x, and everything of the same signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.base import Adapter, adapter
from sampler.types import Cond, Level, SamplerError


class UNetAdapter(Adapter):
    """What the UNet families share: the call, and the inputs that nobody here could give."""

    def check(self) -> None:
        config = self.network.config
        if config.time_cond_proj_dim is not None:
            raise SamplerError(
                "This UNet takes the guidance scale as an input (time_cond_proj_dim, a distilled "
                "model such as LCM), which is not supported; load the model it was made from.",
                6,
            )
        if config.encoder_hid_dim_type == "ip_image_proj":
            raise SamplerError(
                "This UNet wants an image prompt (IP-Adapter), which is not supported; "
                "call pipe.unload_ip_adapter() first.",
                6,
            )

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        network = self.networks[model]
        return network(x, self.time(level, x), return_dict=False, **cond)[0]


@adapter("StableDiffusionPipeline")
class StableDiffusion(UNetAdapter):
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
