"""Image files and tensors as inputs: read, masked, encoded into a pipeline's latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler.types import SamplerError


def read(path: str | Path) -> Tensor:
    """An image file as [1, 3, H, W] in [0, 1], float32, turned upright by its EXIF tag.

    Raises SamplerError (2) for a file that is missing or no image.
    """
    return _pixels(path, "RGB").permute(2, 0, 1)[None]


def read_mask(path: str | Path) -> Tensor:
    """An image file as [H, W] of 0 and 1, white (> 0.5) is 1."""
    return (_pixels(path, "L") > 0.5).float()


def encode(adapter: Any, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as the latents [B, C, h, w] of a pipeline, float32.

    The mean of the encoder's distribution, where it has one. Raises ValueError for a VAE whose
    latents this project cannot make.
    """
    vae = adapter.pipe.vae
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        raise ValueError("Images cannot be encoded for a VAE with per-channel latent statistics.")
    answer = vae.encode((images * 2 - 1).to(adapter.device, vae.dtype))
    latents = answer.latents if hasattr(answer, "latents") else answer.latent_dist.mode()
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * config.scaling_factor


def _pixels(path: str | Path, mode: str) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert(mode)
    except (OSError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "it is no image that can be read"
        raise SamplerError(f"{path}: {reason.lower()}.", 2) from None
    return torch.from_numpy(np.asarray(upright, dtype=np.float32) / 255)
