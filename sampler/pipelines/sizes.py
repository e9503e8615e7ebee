"""Sizes of images and latents."""

from __future__ import annotations

import math
from typing import Any


class ImageSizes:
    """Part of an adapter that knows which image sizes the network takes."""

    pipe: Any
    network: Any

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return self.pipe.vae_scale_factor

    @property
    def patch(self) -> int:
        """Latents per token of the network, along each side."""
        return self.network.config.get("patch_size") or 1

    @property
    def native(self) -> tuple[int, int]:
        """(height, width) that the model was trained for, in latents."""
        own = self.network.config.sample_size
        return (own, own) if isinstance(own, int) else tuple(own)

    @property
    def unit(self) -> int:
        """Divisor of height and width: whole latents and, for transformers, patches.

        At least 8, as in the stock pipelines.
        """
        return math.lcm(8, self.factor * self.patch)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return (height, width) in pixels, with the model's own size where None.

        Raises ValueError for a size that the latents cannot represent.
        """
        rows, cols = self.native
        chosen = (
            rows * self.factor if height is None else height,
            cols * self.factor if width is None else width,
        )
        for label, value in zip(("height", "width"), chosen, strict=True):
            if value < self.unit or value % self.unit:
                raise ValueError(f"{label} = {value} must be a positive multiple of {self.unit}.")
        return chosen

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""
        return (self.network.config.in_channels, height // self.factor, width // self.factor)
