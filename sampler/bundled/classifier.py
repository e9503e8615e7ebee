"""The small classifier of the bundled model's world, and the Fréchet distance in its features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from sampler.bundled import FOLDER

IMAGE_SIZE = 64
"""Side in pixels at which the classifier looks at every image."""

LAYERS = ((24, 2), (48, 2), (48, 1), (96, 2), (96, 1), (160, 2), (160, 1))
"""Output channels and stride of each 3x3 convolution."""


class Logits(NamedTuple):
    """Unnormalised log-probabilities: [B, concepts], [B, styles], [B, backgrounds]."""

    concept: Tensor
    style: Tensor
    background: Tensor


class SmallClassifier(nn.Module):
    """Seven 3x3 convolutions with BatchNorm and ReLU, a global mean, and three linear heads.

    Images are [B, 3, H, W] with values in [0, 1]; any size is resized to 64 x 64. The feature is
    the global mean of the last layer, [B, 160].
    """

    def __init__(
        self,
        concepts: int,
        styles: int,
        backgrounds: int,
        layers: Sequence[Sequence[int]] = LAYERS,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for width, stride in layers:
            blocks += [
                nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.body = nn.Sequential(*blocks)
        self.heads = nn.ModuleDict(
            {
                "concept": nn.Linear(channels, concepts),
                "style": nn.Linear(channels, styles),
                "background": nn.Linear(channels, backgrounds),
            }
        )

    def features(self, images: Tensor) -> Tensor:
        """The feature [B, 160] of images [B, 3, H, W] in [0, 1]; differentiable."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.body(images * 2 - 1).mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Logits:
        """The three heads' logits of features [B, 160]."""
        return Logits(*(self.heads[name](features) for name in Logits._fields))

    def forward(self, images: Tensor) -> Logits:
        """The three heads' logits of images [B, 3, H, W] in [0, 1]."""
        return self.logits(self.features(images))


def load(folder: Path | str = FOLDER / "classifier") -> SmallClassifier:
    """The classifier of a folder (config.json, model.safetensors), float32, in eval mode."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = (len(config[key]) for key in ("concepts", "styles", "backgrounds"))
    model = SmallClassifier(*sizes, layers=config["layers"])
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval().requires_grad_(False)


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    covariance: Tensor


def feature_statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance of features [N, D], computed in float64."""
    features = features.double()
    return Statistics(features.mean(0), torch.cov(features.T))


def reference_statistics(path: Path | str = FOLDER / "statistics.safetensors") -> Statistics:
    """The shipped statistics of real composites; see the model card."""
    stored = load_file(path)
    return Statistics(stored["mean"].double(), stored["covariance"].double())


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The Fréchet distance of two Gaussians of means [D] and covariances [D, D], in squared units.

        |m1 − m2|² + tr(C1 + C2 − 2·(C1·C2)^(1/2))

    tr (C1·C2)^(1/2) is the sum of the square roots of the product's eigenvalues, which are real
    and not negative up to rounding, since the product is similar to a positive semidefinite
    matrix; rounding below 0 is 0. Reference: Heusel et al. (2017), arXiv 1706.08500, eq. 6.
    """
    mean1, cov1, mean2, cov2 = (value.double() for value in (mean1, cov1, mean2, cov2))
    roots = torch.linalg.eigvals(cov1 @ cov2).real.clamp_min(0).sqrt()
    spread = cov1.trace() + cov2.trace() - 2 * roots.sum()
    return max(float((mean1 - mean2).square().sum() + spread), 0.0)
