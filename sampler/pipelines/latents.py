"""Images to latents and back, by the VAE of a pipeline."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from sampler.core.locks import exclusive

LI = TypeVar("LI", bound="LatentImages")


class LatentImages:
    """Part of an adapter that decodes and encodes images by `pipe.vae`."""

    pipe: Any
    clamps = True  # images to [0, 1], see `unclamped`

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images [B, 3, H, W], float32 in [0, 1]."""
        vae = self.pipe.vae
        shift = vae.config.get("shift_factor")
        unscaled = latents / vae.config.scaling_factor
        return self.pixels(vae, unscaled + shift if shift else unscaled)

    def latents_of(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] to clean latents [B, ...], float32.

        The mode of the encoder's distribution, where it has one. Raises ValueError for a VAE with
        per-channel statistics.
        """
        config = self.pipe.vae.config
        if config.get("latents_mean") is not None:
            raise ValueError(
                "Images cannot be encoded for a VAE with per-channel latent statistics."
            )
        return (self.encoded(images) - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def encoded(self, images: Tensor) -> Tensor:
        """Encode images in [0, 1] to unscaled latents, float32."""
        vae = self.pipe.vae
        with exclusive(vae):  # video VAEs cache features between frames
            output = vae.encode((images * 2 - 1).to(self.device, vae.dtype))
        latents = output.get("latents", output.get("latent"))
        return (output.latent_dist.mode() if latents is None else latents).float()

    def pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode unscaled latents; images in [0, 1]."""
        with exclusive(vae):
            images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return self.in_range(images / 2 + 0.5)

    def unclamped(self: LI) -> LI:
        """Return the same adapter, whose `decode` leaves values outside [0, 1], with gradients."""
        twin = copy.copy(self)  # shares the networks; only the last step differs
        twin.clamps = False
        return twin

    def in_range(self, images: Tensor) -> Tensor:
        """Clamp images to [0, 1], except those of an `unclamped` adapter."""
        return images.clamp(0, 1) if self.clamps else images
