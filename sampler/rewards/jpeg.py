"""Compressibility: the size of a JPEG file, and a differentiable estimate of it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Le

from sampler.core.jpeg import CHROMINANCE, COSINES, LUMINANCE, YCBCR, scaled_table
from sampler.registry import register
from sampler.rewards.base import PixelReward
from sampler.rewards.scoring import score_dtype

if TYPE_CHECKING:
    from torch import Tensor

QUALITY = 95  # of the compressibility rewards in the literature (DDPO, Black et al., 2023)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Return the JPEG sizes [B] of images [B, 3, H, W] at quality 95, in units of 1000 bytes."""
    import torch
    from PIL import Image

    from sampler.core.images import to_pixels

    sizes = []
    for pixels in to_pixels(images.detach().float()):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=score_dtype(images), device=images.device)


@register("reward", "compressibility")
@dataclass(frozen=True)
class Compressibility(PixelReward):
    """Minus the size of the image as a JPEG of quality 95, in kB: smooth images score high."""

    reference: ClassVar[str] = (
        "Training Diffusion Models with Reinforcement Learning (Black et al., 2023), "
        "arXiv:2305.13301, section 5"
    )

    @property
    def differentiable(self) -> bool:
        return False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -jpeg_kilobytes(images)


@register("reward", "incompressibility")
@dataclass(frozen=True)
class Incompressibility(PixelReward):
    """The size of the image as a JPEG of quality 95, in kB: busy images score high."""

    reference: ClassVar[str] = Compressibility.reference

    @property
    def differentiable(self) -> bool:
        return False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return jpeg_kilobytes(images)


@register("reward", "soft_compressibility")
@dataclass(frozen=True)
class SoftCompressibility(PixelReward):
    """Minus a differentiable estimate of the JPEG size, in kB.

        c = DCT of the 8 x 8 blocks of Y, and of Cb and Cr averaged over 2 x 2 pixels
        score = −Σ log₂(1 + |c/Q|) / 8000,   Q the standard tables scaled to the quality

    The sum counts the bits of the quantised coefficients; no run lengths and no Huffman code.
    Sides are padded to multiples of 16 by repeating the edge.

    quality: 95 as in `compressibility`.
    """

    quality: Annotated[int, Ge(1), Le(100)] = QUALITY

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch.nn.functional as F

        images = images.to(score_dtype(images))
        high, wide = (-side % 16 for side in images.shape[2:])
        images = F.pad(images, (0, wide, 0, high), mode="replicate")
        matrix = images.new_tensor(YCBCR)
        planes = (matrix @ (255 * images).flatten(2)).reshape(images.shape)
        luma, chroma = planes[:, :1] - 128, F.avg_pool2d(planes[:, 1:], 2)
        tables = (scaled_table(t, self.quality) for t in (LUMINANCE, CHROMINANCE))
        bits = [_bits(p, t) for p, t in zip((luma, chroma), tables, strict=True)]
        return -(bits[0] + bits[1]) / 8000


def _bits(planes: Tensor, table: list[list[int]]) -> Tensor:
    """Σ log₂(1 + |c/Q|) per row [B] of planes [B, C, H, W], H and W multiples of 8."""
    basis = planes.new_tensor(COSINES)
    blocks = planes.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    ratio = (coefficients / planes.new_tensor(table)).abs()
    return ratio.log1p().flatten(1).sum(1) / math.log(2)
