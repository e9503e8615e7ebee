"""Stable Diffusion 1.x and 2.x, and UNets of the same signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sampler.core.errors import ModelError
from sampler.pipelines.base import Adapter
from sampler.pipelines.families import adapter
from sampler.types import Cond, Level


class UNetAdapter(Adapter):
    """Base class of the UNet families.

    A network distilled with the guidance scale as an input (`time_cond_proj_dim`, as in latent
    consistency models) takes the scale of the rule "embedded", or `embedded_scale`, in every
    branch.
    """

    def check(self) -> None:
        config = self.network.config
        if config.encoder_hid_dim_type == "ip_image_proj":
            raise ModelError(
                "This UNet needs an image prompt (IP-Adapter), which is not supported; "
                "call pipe.unload_ip_adapter() first.",
            )

    @property
    def default_guidance(self) -> dict[str, Any]:
        if self.network.config.time_cond_proj_dim is None:
            return super().default_guidance
        return {"name": "embedded", "scale": self.embedded_scale}

    def with_guidance_scale(self, cond: Cond, scale: float) -> Cond:
        size = self.network.config.time_cond_proj_dim
        if size is None:
            return super().with_guidance_scale(cond, scale)
        rows = cond.cond["encoder_hidden_states"].shape[0]
        embedded = scale_embedding(torch.full((rows,), scale), size).to(self.device, self.dtype)
        branches = (
            None if branch is None else {**branch, "timestep_cond": embedded}
            for branch in (cond.cond, cond.uncond)
        )
        return replace(cond, **dict(zip(("cond", "uncond"), branches, strict=True)))

    def with_scale(self, cond: Cond) -> Cond:
        """Add the default scale to the conditions, where the network takes one."""
        takes_scale = self.network.config.time_cond_proj_dim is not None
        return self.with_guidance_scale(cond, self.embedded_scale) if takes_scale else cond

    def text_states(self, cond: Any, model: str) -> Tensor:
        states = cond["encoder_hidden_states"]
        return self.networks[model].process_encoder_hidden_states(states, {})

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        network = self.networks[model]
        return network(x, self.time(level, x), return_dict=False, **cond)[0]


@adapter("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
class StableDiffusion(UNetAdapter):
    """UNet with cross-attention on the text encoder's states; eps- or v-prediction."""

    takes_weights = True
    text_tokens = (("tokenizer", 0),)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        cond, uncond = self.encode_prompt(
            self.plain(prompts),
            self.device,
            1,
            guided,
            negative_prompt=self.plain(negative) if guided else None,
        )
        cond = self.reweighted(cond, prompts)
        uncond = self.reweighted(uncond, negative) if guided else None
        return self.with_scale(
            Cond(
                {"encoder_hidden_states": cond},
                {"encoder_hidden_states": uncond} if guided else None,
            )
        )


def scale_embedding(scale: Tensor, size: int) -> Tensor:
    """Embed guidance scales w [B] as [B, D], float32; an odd D = size ends with a zero.

        e = [sin(1000·(w − 1)·f_k), cos(1000·(w − 1)·f_k)],   f_k = 10000^(−k/(D/2 − 1)), k < D/2

    w is in our convention (1 is the conditional model), D the network's `time_cond_proj_dim`. Luo
    et al. (2023), arXiv:2310.04378, section 4.3, with the factor 1000 and the frequencies of
    diffusers' pipelines.
    """
    half = size // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step).to(scale.device)
    angles = (scale.float() - 1)[:, None] * 1000.0 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(embedding, (0, size % 2))
