"""Differentiable preprocessing of images in [0, 1] for image encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

# Radford et al. (2021), CLIP.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Preprocess as CLIPImageProcessor: shortest side to `size` (bicubic), centre crop, normalise.

    images [B, 3, H, W] in [0, 1] → [B, 3, size, size].
    """
    images = crop(shortest(images, size, "bicubic"), size)
    return normalised(images, CLIP_MEAN, CLIP_STD)


def shortest(images: Tensor, size: int, mode: Literal["bicubic", "bilinear"]) -> Tensor:
    """Resize the shortest side to `size`, keeping the aspect; clamp, since bicubic overshoots."""
    height, width = images.shape[2:]
    if min(height, width) == size:
        return images
    if height <= width:
        target = (size, int(size * width / height))
    else:
        target = (int(size * height / width), size)
    return resized(images, target, mode)


def resized(images: Tensor, size: tuple[int, int], mode: Literal["bicubic", "bilinear"]) -> Tensor:
    """Resize to (height, width) with antialiasing, clamped to [0, 1]."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode=mode, antialias=True).clamp(0, 1)


def crop(images: Tensor, size: int) -> Tensor:
    """Crop the central size x size pixels; sides are at least `size`."""
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x − mean) / std per channel."""
    return (images - images.new_tensor(mean).view(1, 3, 1, 1)) / images.new_tensor(std).view(
        1, 3, 1, 1
    )


class Preprocessing(NamedTuple):
    """The preprocessing of a preprocessor_config.json."""

    size: dict[str, int]
    crop: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess images [B, 3, H, W] in [0, 1]; bilinear, differentiable."""
        if "shortest_edge" in self.size:
            side, sides = self.size["shortest_edge"], images.shape[2:]
            if "longest_edge" in self.size:
                side = min(side, int(self.size["longest_edge"] * min(sides) / max(sides)))
            images = shortest(images, side, "bilinear")
        else:
            images = resized(images, (self.size["height"], self.size["width"]), "bilinear")
        if self.crop is not None:
            images = crop(images, self.crop)
        return normalised(images, self.mean, self.std)
