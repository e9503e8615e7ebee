"""Maps of words over an image, from the attention of its tokens to those of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Columns = Sequence[Sequence[int]]  # tokens of each of K words


def token_grid(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of N tokens over latents of (height, width), N = ⌈height/f⌉·⌈width/f⌉.

    Raises ValueError where there is no such whole f.
    """
    height, width = size
    for factor in range(1, max(size) + 1):
        rows, columns = -(-height // factor), -(-width // factor)
        if rows * columns == count:
            return rows, columns
    raise ValueError(f"{count} tokens are no reduced copy of latents of {height} x {width}.")


def word_maps(
    layers: Mapping[str, Tensor], words: Sequence[Columns], size: tuple[int, int]
) -> Tensor:
    """Maps [B, K, h, w] of K words from the attention {layer: [B, N, T]} of N tokens.

        m_k = mean over layers of  Σ_{c in columns of k} A[:, :, c] / its mean over the image

    words: the columns of each image's words; images with fewer than K words have maps of 0. size:
    (h, w), to which the maps are interpolated. Where a layer is 0 everywhere its part is 0.
    """
    most = max(len(columns) for columns in words)
    total = torch.zeros(len(words), most, *size)
    for layer in layers.values():
        rows, columns = token_grid(layer.shape[1], size)
        found = layer.new_zeros(len(words), most, layer.shape[1])
        for b, own in enumerate(words):
            for k, places in enumerate(own):
                found[b, k] = layer[b][:, list(places)].sum(1)
        mean = found.mean(2, keepdim=True)
        found = found / torch.where(mean > 0, mean, torch.ones_like(mean))
        image: Tensor = found.float().reshape(len(words), most, rows, columns)
        image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        total = total.to(image) + image / len(layers)
    return total


def half_squared_gap(preds: Mapping[str, object]) -> Tensor:
    """½‖c − u‖² per row [B], the score of Grad-SAM that needs no classifier."""
    cond, uncond = (getattr(preds[name], "out") for name in ("cond", "uncond"))  # noqa: B009
    return 0.5 * (cond - uncond).tensor().square().flatten(1).sum(1)
