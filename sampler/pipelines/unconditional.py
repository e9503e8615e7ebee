"""Models of pixels without a prompt: DDPM and DDIM pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.core.schedule import clipped
from sampler.pipelines.base import Adapter
from sampler.pipelines.families import adapter
from sampler.types import Cond, Level, Prediction


class PixelUNet(Adapter):
    """UNet on images in [-1, 1]; latents are pixels."""

    @property
    def factor(self) -> int:
        return 1

    @property
    def unit(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.in_range(latents.float() / 2 + 0.5)

    def latents_of(self, images: Tensor) -> Tensor:
        return (images * 2 - 1).to(self.device)

    def no_text(self, prompts: Sequence[str], negative: Sequence[str], guided: bool) -> None:
        """Raise ValueError for prompts and guidance of an unconditional model."""
        if any(prompts) or any(negative):
            raise ValueError("An unconditional model takes no prompt; pass '', and n.")
        if guided:
            raise ValueError("An unconditional model cannot be guided; use guidance = 'none'.")


@adapter("DDPMPipeline", "DDIMPipeline")
class Unconditional(PixelUNet):
    """eps-, v- or x0-prediction; x0 is clipped where the scheduler clips it (`clip_sample`)."""

    processes = ("vp",)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        self.no_text(prompts, negative, guided)
        return Cond({})

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        return self.networks[model](x, self.time(level, x), return_dict=False)[0]

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        pred, scheduler = super().predict(x, out, level, model), self.pipe.scheduler
        return clipped(pred, x, scheduler.config, type(scheduler).__name__)
