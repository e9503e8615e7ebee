"""Base class of the flow-matching transformers: alpha = 1 − sigma, velocity prediction.

Families differ in text encoding, in the time and the sign of the network, and in how the grid
depends on the image size.

The tensors of a condition have one row per sample, of several prompts and of both branches. Inputs
without rows (token positions, sizes) are computed from shapes in `forward`.
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
    """Velocity-predicting transformer; max_shift: default where the scheduler has none."""

    network_name = "transformer"
    processes = ("flow",)
    max_shift = 1.15

    def stock_times(self, steps: int) -> list[float] | None:
        """Times before the shift that the stock pipeline passes; None: the scheduler's."""
        return None

    def linear_times(self, steps: int) -> list[float]:
        """Times from 1 to 1/N, as in several stock pipelines."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def tokens(self, size: tuple[int, int]) -> int:
        """Number of tokens of an image; the shift of a dynamic grid follows it."""
        height, width = size
        side = self.factor * self.patch
        return (height // side) * (width // side)

    def mu(self, steps: int, size: tuple[int, int]) -> float:
        """Shift exponent of a dynamic grid."""
        return dynamic_mu(self.tokens(size), self.pipe.scheduler.config, self.max_shift)

    def grid(self, steps: int, size: tuple[int, int]) -> tuple[Level, ...]:
        mu = None if self.schedule.dynamic is None else self.mu(steps, size)
        if self.spacing is not None:
            return self.schedule.grid(steps, spacing=self.spacing, mu=mu)
        sigmas = self.stock_times(steps) if steps > 0 else None  # the schedule rejects other steps
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
        """Conditions of both branches, with the default scale where the network takes one."""
        both = Cond(cond, uncond)
        return self.with_guidance_scale(both, self.embedded_scale) if self._embeds else both

    @property
    def _embeds(self) -> bool:
        return bool(self.network.config.get("guidance_embeds"))

    def row_times(self, level: Level, x: Tensor) -> Tensor:
        """Timestep of each row [R], float32: 1000 at the noisy end."""
        return self.time(level, x).float().expand(x.shape[0])

    def video_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, f, h, w] of a video VAE to frames [B, 3, F, H, W] in [0, 1]."""
        vae = self.pipe.vae
        mean, std = self._statistics(latents.to(vae.dtype))
        return self.pixels(vae, latents.to(vae.dtype) / (1.0 / std) + mean)

    def video_latents(self, frames: Tensor) -> Tensor:
        """Encode frames [B, 3, F, H, W] in [0, 1] to clean latents [B, C, f, h, w]."""
        latents = self.encoded(frames)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = (like.new_tensor(v) for v in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def pack(latents: Tensor) -> Tensor:
    """Pack [R, C, h, w] into tokens [R, (h/2)·(w/2), 4·C], one per 2 x 2 patch."""
    rows, channels, height, width = latents.shape
    patches = latents.view(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * 4)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Unpack tokens to latents of shape [R, C, h, w]."""
    rows, channels, height, width = shape
    patches = tokens.view(rows, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def padded(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Zero-pad sequences [L_i, D] to one tensor [B, L, D]; also return its bool mask [B, L]."""
    length = max(len(t) for t in tensors)
    stacked = tensors[0].new_zeros(len(tensors), length, tensors[0].shape[-1])
    mask = torch.zeros(len(tensors), length, dtype=torch.bool, device=stacked.device)
    for row, values in enumerate(tensors):
        stacked[row, : len(values)] = values
        mask[row, : len(values)] = True
    return stacked, mask
