"""Wan: text to video, with one network or with one for each part of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer
from sampler.types import Cond, Level

TEXT_LENGTH = 512  # tokens, the stock pipeline's default


@adapter("WanPipeline")
class Wan(FlowTransformer):
    """Velocity prediction at times 0..1000 on latents [C, f, h, w]; images are [B, 3, F, H, W].

    frames: F, one more than a multiple of the VAE's temporal factor; the stock default unless set.
    With `boundary_ratio`, `transformer_2` takes over below that fraction of the time. A separate
    scale for it (`guidance_scale_2`) is not supported; rules have windows instead.
    """

    def __init__(self, pipe: Any, weak: Any = None) -> None:
        super().__init__(pipe, weak)
        self.frames = int(self._default_of("num_frames"))

    @property
    def factor(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    @property
    def patch(self) -> int:
        return self.network.config.patch_size[1]

    @property
    def native(self) -> tuple[int, int]:
        sides = (int(self._default_of(side)) for side in ("height", "width"))
        height, width = (side // self.factor for side in sides)
        return height, width

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor, frames = self.pipe.vae_scale_factor_temporal, self.frames or 0
        if frames < 1 or (frames - 1) % factor:
            raise ValueError(f"frames = {frames} must be 1 more than a multiple of {factor}.")
        count = (frames - 1) // factor + 1
        channels = self.network.config.in_channels
        return (channels, count, height // self.factor, width // self.factor)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        states, uncond = self.encode_prompt(
            list(prompts),
            list(negative),
            guided,
            max_sequence_length=TEXT_LENGTH,
            device=self.device,
        )
        cond = {"encoder_hidden_states": states.to(self.dtype)}
        return Cond(cond, {"encoder_hidden_states": uncond.to(self.dtype)} if guided else None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        time = self.row_times(level, x)
        if self.pipe.config.expand_timesteps:  # one per token; all the same from text alone
            time = time[:, None].expand(-1, x.shape[2] * self.tokens_of(x))
        network = self.network_at(level, model)
        return network(x, timestep=time, return_dict=False, **cond)[0]

    def network_at(self, level: Level, model: str) -> Any:
        late = model == "main" and self._late(level)
        return self.pipe.transformer_2 if late else self.networks[model]

    def tokens_of(self, x: Tensor) -> int:
        """Number of tokens of one frame."""
        return (x.shape[3] // self.patch) * (x.shape[4] // self.patch)

    def _late(self, level: Level) -> bool:
        ratio = self.pipe.config.boundary_ratio
        return ratio is not None and float(level.t) < ratio * self.schedule.train_steps

    def decode(self, latents: Tensor) -> Tensor:
        return self.video_pixels(latents)

    def latents_of(self, images: Tensor) -> Tensor:
        return self.video_latents(images if images.ndim == 5 else images[:, :, None])
