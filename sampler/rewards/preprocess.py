"""Differentiable preprocessing of images in [0, 1] for image encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

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


def padded_pixels(images: Tensor, size: int) -> Tensor:
    """Preprocess as HPSv2's authors do: longest side to `size`, zeros around it, normalise.

    Bicubic; the smaller half of an odd border is above and left. images [B, 3, H, W] in [0, 1] →
    [B, 3, size, size].
    """
    height, width = images.shape[2:]
    scale = size / max(height, width)
    target = (round(height * scale), round(width * scale))
    images = resized(images, target, "bicubic")
    top, left = ((size - side) // 2 for side in target)
    border = (left, size - target[1] - left, top, size - target[0] - top)
    return normalised(F.pad(images, border), CLIP_MEAN, CLIP_STD)


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
    """The preprocessing of a preprocessor_config.json; None skips resizing, cropping, normalising.

    size: {"height", "width"}, or {"shortest_edge"} with or without {"longest_edge"}.
    """

    size: dict[str, int] | None
    crop: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...]
    mode: Literal["bicubic", "bilinear"] = "bilinear"

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess images [B, 3, H, W] in [0, 1]; differentiable."""
        if self.size is not None:
            images = self.resize(images, self.size)
        if self.crop is not None:
            images = crop(images, self.crop)
        return images if self.mean is None else normalised(images, self.mean, self.std)

    def resize(self, images: Tensor, size: dict[str, int]) -> Tensor:
        if "shortest_edge" not in size:
            return resized(images, (size["height"], size["width"]), self.mode)
        side, sides = size["shortest_edge"], images.shape[2:]
        if "longest_edge" in size:
            side = min(side, int(size["longest_edge"] * min(sides) / max(sides)))
        return shortest(images, side, self.mode)


# PIL's numbers of resampling filters, as preprocessor_config.json has them.
BILINEAR = 2
MODES: dict[int, Literal["bicubic", "bilinear"]] = {BILINEAR: "bilinear", 3: "bicubic"}


def preprocessing_from(config: Mapping[str, Any]) -> Preprocessing:
    """Read the fields of a preprocessor_config.json; bilinear where it has no `resample`.

    With `crop_pct` (ConvNeXt) the shortest side becomes size/crop_pct and the centre is cropped to
    the size; from 384 pixels on, images are squeezed to the size instead.
    """
    size = config.get("size", {"height": 224, "width": 224})
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    side = config.get("crop_size") if config.get("do_center_crop") else None
    side = side["height"] if isinstance(side, dict) else side
    if (share := config.get("crop_pct")) and (edge := size.get("shortest_edge")):
        small = edge < 384
        side = edge if small else None
        size = {"shortest_edge": int(edge / share)} if small else {"height": edge, "width": edge}
    normalise = config.get("do_normalize", True)
    return Preprocessing(
        size if config.get("do_resize", True) else None,
        side,
        tuple(config.get("image_mean") or (0.5, 0.5, 0.5)) if normalise else None,
        tuple(config.get("image_std") or (0.5, 0.5, 0.5)),
        MODES[config.get("resample", BILINEAR)],
    )
