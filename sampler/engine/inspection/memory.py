"""Memorised training images: nearest neighbours of samples, and agreement of two trainings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Nearest(NamedTuple):
    """Cosine distances [B] to the nearest and the second nearest training image, its number [B].

    A copy has a first distance near 0 and a second one that is much larger.
    """

    first: Tensor
    second: Tensor
    index: Tensor


def nearest(samples: Tensor, training: Tensor) -> Nearest:
    """Nearest neighbours of features [B, F] among features [N, F]: 1 − cosine, float64.

    Raises ValueError for fewer than two training images, and features of different length.
    """
    if len(training) < 2 or samples.ndim != 2 or samples.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"memory: features {tuple(samples.shape)} and {tuple(training.shape)}; give [B, F] and "
            "at least two training images [N, F]."
        )
    a, b = (F.normalize(x.double(), dim=1) for x in (samples, training))
    # From differences: 1 − a·b would lose small distances to rounding.
    distances = torch.stack([(row - b).square().sum(1) / 2 for row in a])
    found = distances.topk(2, dim=1, largest=False)
    return Nearest(found.values[:, 0], found.values[:, 1], found.indices[:, 0])


def agreement(
    first: Any, second: Any, prompts: Sequence[str], seeds: Any = 0, **options: Any
) -> Tensor:
    """Cosine [B] of the latents that two engines make of the same noise and prompts.

    Of two models trained on disjoint halves of a data set: near 1 where both have learned the
    distribution, low where each has learned its own images (Kadkhodaie et al., 2024,
    arXiv:2310.02557). options: of `generate`. Raises ValueError for latents of different shape.
    """
    made = [e.generate(prompts, seeds=seeds, output="latent", **options) for e in (first, second)]
    a, b = (result.latents.double().flatten(1) for result in made)
    if a.shape != b.shape:
        raise ValueError("memory: the two models have latents of different shapes.")
    return F.cosine_similarity(a, b)
