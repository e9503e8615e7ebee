"""Conversion between image files, tensors and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler.core.image_files import DEFAULT_STRENGTH, as_rgb, read_rgb
from sampler.core.noise import initial
from sampler.registry.constraints import as_float
from sampler.types import Level


def read(path: str | Path | bytes, name: str = "", on_white: bool = False) -> Tensor:
    """Read an image file, or the bytes of one, as [1, 3, H, W] in [0, 1], float32.

    It is rotated by its EXIF tag; name, on_white: as in `read_rgb`. Raises UsageError for a file
    that is missing or not an image.
    """
    return as_images(read_rgb(path, name, on_white))


def read_mask(path: str | Path) -> Tensor:
    """Read an image file as [H, W] of 0 and 1; white (> 0.5) is 1."""
    values = np.asarray(read_rgb(path).convert("L"), dtype=np.float32) / 255
    return (torch.as_tensor(values) > 0.5).float()


def as_images(source: Any) -> Tensor:
    """Convert a path, a PIL image or a tensor [(B,) 3, H, W] to [B, 3, H, W] in [0, 1]."""
    if isinstance(source, (str, Path)):
        return read(source)
    if isinstance(source, Tensor):
        images = source if source.ndim == 4 else source[None]
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"An image tensor is [B, 3, H, W], not {tuple(source.shape)}.")
        return images.float()
    array = np.asarray(as_rgb(source), dtype=np.float32) / 255
    return torch.as_tensor(array).permute(2, 0, 1)[None]


def start_from(
    x0: Tensor, levels: Sequence[Level], strength: float, seeds: Sequence[int]
) -> tuple[Tensor, tuple[Level, ...]]:
    """Start a run from clean samples x0 [B, ...] (image to image, or a restorer's output).

        x = alpha·x0 + sigma·n at the first of the last floor(strength·N) steps of N

    n is the first noise of each sample's seed, which is N(0, I). Returns (x, the remaining
    levels); at strength 0 only the last level remains and x = x0. With x0 = R(y), R a restorer,
    this is the start of DifFace (Yue & Loy, 2022, arXiv:2212.06512, eq. 5).

    Raises ValueError for a strength outside 0..1.
    """
    check_strength(strength)
    steps = len(levels) - 1
    left = tuple(levels[steps - steps_left(steps, strength) :])
    if len(left) == 1:
        return x0, left
    noise = initial(seeds, tuple(x0.shape[1:])).to(x0)
    return left[0].alpha * x0 + left[0].sigma * noise, left


def steps_left(steps: int, strength: float) -> int:
    """Number of the last steps that a start at this strength leaves: floor(strength·steps)."""
    return min(steps, int(float(strength) * steps + 1e-9))


def strength_of(image: Any, strength: float | None) -> float:
    """Return the strength of a start from `image`, DEFAULT_STRENGTH if it is None.

    Raises ValueError for a strength without an image.
    """
    if image is None and strength is not None:
        raise ValueError(
            f"strength = {strength!r:.40} has no effect without image, the image to start from."
        )
    return DEFAULT_STRENGTH if strength is None else strength


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength outside 0..1."""
    if not 0 <= as_float(strength, "strength") <= 1:
        raise ValueError(f"strength = {strength} must lie in 0..1; 0 returns the image.")


def to_pixels(images: Tensor) -> Sequence[np.ndarray]:
    """Round images [B, 3, H, W] in [0, 1] to uint8 [H, W, 3] each, on their device.

    On a CPU they are views, so that the copy is made by the threads that encode them.
    """
    if images.device.type == "cpu":  # one image at a time fits the cache
        return [_rounded(image).permute(1, 2, 0).numpy() for image in images]
    return [*_rounded(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def _rounded(images: Tensor) -> Tensor:
    return (images * 255).nan_to_num_(0).round_().clamp_(0, 255).to(torch.uint8)
