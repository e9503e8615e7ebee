"""Figures of generated images of the bundled model's world: agreement, saturation, distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sampler.bundled import EvaluationPrompt
from sampler.bundled.classifier import (
    SmallClassifier,
    Statistics,
    feature_statistics,
    frechet_distance,
)


def saturation(images: Tensor) -> float:
    """Mean over pixels of largest − smallest channel, of images [B, 3, H, W] in [0, 1]."""
    return float((images.amax(1) - images.amin(1)).mean())


def clipped_share(images: Tensor) -> float:
    """The share of values within 0.005 of 0 or 1, which is beyond 0.99 in [-1, 1]."""
    return float(((images < 0.005) | (images > 0.995)).float().mean())


@torch.no_grad()
def extracted_features(model: SmallClassifier, images: Tensor) -> Tensor:
    """The features [N, 160] of images [N, 3, H, W] in [0, 1]."""
    return torch.cat([model.features(part) for part in images.split(256)])


def agreement(
    model: SmallClassifier, features: Tensor, prompts: Sequence[EvaluationPrompt]
) -> dict[str, float]:
    """The share of images whose top class is the prompt's, for each head that prompts name."""
    logits = model.logits(features)
    shares = {}
    for head in ("concept", "style", "background"):
        wanted = [getattr(prompt, head) for prompt in prompts]
        if None not in wanted:
            found = getattr(logits, head).argmax(1).cpu()
            shares[head] = float((found == torch.tensor(wanted)).float().mean())
    return shares


def measure(
    model: SmallClassifier,
    images: Tensor,
    prompts: Sequence[EvaluationPrompt],
    reference: Statistics,
) -> dict[str, float]:
    """Agreement per head, Fréchet distance, saturation and clipped share of images [N, 3, H, W].

    The Fréchet distance is that of the features to the reference statistics; it falls with the
    number of images, so compare equal numbers only.
    """
    features = extracted_features(model, images)
    distance = frechet_distance(*feature_statistics(features), *reference)
    return agreement(model, features, prompts) | {
        "frechet_distance": distance,
        "saturation": saturation(images),
        "clipped_share": clipped_share(images),
        "images": len(images),
    }
