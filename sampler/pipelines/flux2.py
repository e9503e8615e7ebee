"""Flux 2 and its Klein models: states of a language model beside 2 x 2 patches as channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer
from sampler.types import Cond, Level


@adapter("Flux2Pipeline", "Flux2KleinPipeline")
class Flux2(FlowTransformer):
    """Velocity prediction at times 0..1; latents [4·C, h/2, w/2], normalised by the VAE.

    A distilled network takes a guidance scale as in Flux. Klein models use CFG instead, unless the
    pipeline is marked as distilled. Reference images and prompt rewriting of the stock pipelines
    are not supported.
    """

    def stock_times(self, steps: int) -> list[float] | None:
        return None if self.schedule.open_end else self.linear_times(steps)

    def mu(self, steps: int, size: tuple[int, int]) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(self.tokens(size), steps)

    @property
    def default_scale(self) -> float:
        distilled = self.network.config.guidance_embeds or self.pipe.config.get("is_distilled")
        return 1.0 if distilled else super().default_scale

    @property
    def patch(self) -> int:
        return 2

    @property
    def native(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size
        return side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        side = self.factor * 2
        return (self.network.config.in_channels, height // side, width // side)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        return self.branches(self._texts(prompts), self._texts(negative) if guided else None)

    def _texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        states, positions = self.encode_prompt(list(texts), device=self.device)
        return {"encoder_hidden_states": states, "txt_ids": positions}

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        tokens = self.scaled(x, level).flatten(2).transpose(1, 2)
        out = self.networks[model](
            tokens,
            timestep=self.row_times(level, x).to(tokens.dtype) / 1000,
            img_ids=_positions(x.shape[2], x.shape[3], tokens).expand(x.shape[0], -1, -1),
            return_dict=False,
            **cond,
        )[0]
        return out.transpose(1, 2).reshape(x.shape)

    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        latents = latents * std + mean
        count, channels, height, width = latents.shape
        patches = latents.reshape(count, channels // 4, 2, 2, height, width)
        latents = patches.permute(0, 1, 4, 2, 5, 3).reshape(
            count, channels // 4, height * 2, width * 2
        )
        return self.pixels(self.pipe.vae, latents)

    def latents_of(self, images: Tensor) -> Tensor:
        latents = self.encoded(images)
        count, channels, height, width = latents.shape
        patches = latents.view(count, channels, height // 2, 2, width // 2, 2)
        latents = patches.permute(0, 1, 3, 5, 2, 4).reshape(count, -1, height // 2, width // 2)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        mean, variance = (
            v.view(1, -1, 1, 1).to(like) for v in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def _positions(rows: int, cols: int, like: Tensor) -> Tensor:
    """[1, rows·cols, 4]: 0, row, column and 0 of each token."""
    one = torch.arange(1)
    return torch.cartesian_prod(one, torch.arange(rows), torch.arange(cols), one)[None].to(
        like.device
    )
