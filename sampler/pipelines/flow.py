"""What the flow-matching transformers share: alpha = 1 − sigma, velocity, one timestep per row.

Families differ in how they encode text, in the clock and the sign of the network, and in how the
grid depends on the image's size; each has a file of its own.

Conditions of one batch may be of several prompts and of both branches: a tensor of a condition has
one row per sample. What has none (positions of tokens, sizes) is made from shapes in `forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler.core.schedule import dynamic_mu
from sampler.pipelines.base import Adapter
from sampler.types import Cond, Level


class FlowTransformer(Adapter):
    """A velocity-predicting transformer; max_shift: where the scheduler's config has none."""

    network_name = "transformer"
    processes = ("flow",)
    max_shift = 1.15

    def own_times(self, steps: int) -> list[float] | None:
        """The times before the shift, where the stock pipeline brings its own."""
        return None

    def linear_times(self, steps: int) -> list[float]:
        """From 1 down to 1/N, as several stock pipelines have it."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def tokens(self, size: tuple[int, int]) -> int:
        """How many tokens an image of this size has; the shift of a dynamic grid follows it."""
        height, width = size
        side = self.factor * self.patch
        return (height // side) * (width // side)

    def mu(self, steps: int, size: tuple[int, int]) -> float:
        """The shift exponent of a dynamic grid."""
        return dynamic_mu(self.tokens(size), self.pipe.scheduler.config, self.max_shift)

    def grid(self, steps: int, size: tuple[int, int]) -> tuple[Level, ...]:
        mu = None if self.schedule.dynamic is None else self.mu(steps, size)
        sigmas = self.own_times(steps) if steps > 0 else None  # the schedule refuses other steps
        return self.schedule.grid(steps, mu=mu, sigmas=sigmas)

    @property
    def default_guidance(self) -> dict[str, Any]:
        if self._embeds:
            return {"name": "embedded", "scale": self.embedded_scale}
        return super().default_guidance

    def with_guidance_scale(self, cond: Cond, scale: float) -> Cond:
        if not self._embeds:
            return super().with_guidance_scale(cond, scale)

        def with_scale(branch: Any) -> Any:
            if branch is None:
                return None
            rows = len(branch["encoder_hidden_states"])
            return {**branch, "guidance": torch.full((rows,), scale, device=self.device)}

        return replace(cond, cond=with_scale(cond.cond), uncond=with_scale(cond.uncond))

    def branches(self, cond: dict[str, Any], uncond: dict[str, Any] | None) -> Cond:
        """The conditions of both branches, told the default scale where the network takes one."""
        both = Cond(cond, uncond)
        return self.with_guidance_scale(both, self.embedded_scale) if self._embeds else both

    @property
    def _embeds(self) -> bool:
        return bool(self.network.config.get("guidance_embeds"))

    def clock(self, level: Level, x: Tensor) -> Tensor:
        """The timestep of each row [R], float32: 1000 at the noisy end."""
        return self.time(level, x).float().expand(x.shape[0])

    def video_pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] of a video VAE as frames [B, 3, F, H, W] in [0, 1]."""
        vae = self.pipe.vae
        mean, std = self._statistics(latents.to(vae.dtype))
        return self.pixels(vae, latents.to(vae.dtype) / (1.0 / std) + mean)

    def video_latents(self, frames: Tensor) -> Tensor:
        """The inverse: frames [B, 3, F, H, W] in [0, 1] as clean latents [B, C, f, h, w]."""
        latents = self.encoded(frames)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = (like.new_tensor(v) for v in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def pack(latents: Tensor) -> Tensor:
    """[R, C, h, w] to tokens [R, (h/2)·(w/2), 4·C], one per 2 x 2 patch."""
    rows, channels, height, width = latents.shape
    patches = latents.view(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * 4)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, to latents of this shape [R, C, h, w]."""
    rows, channels, height, width = shape
    patches = tokens.view(rows, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def padded(tensors: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Sequences [L_i, D] as one tensor [B, L, D], zeros behind each, and its mask [B, L] of bool.

    length: L, at least the longest's, which is the default.
    """
    length = length or max(len(t) for t in tensors)
    whole = tensors[0].new_zeros(len(tensors), length, tensors[0].shape[-1])
    mask = torch.zeros(len(tensors), length, dtype=torch.bool, device=whole.device)
    for row, values in enumerate(tensors):
        whole[row, : len(values)] = values
        mask[row, : len(values)] = True
    return whole, mask
