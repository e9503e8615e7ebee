"""A second classifier of the bundled model's world, for evaluation only.

A tuned model can exploit errors of the classifier that rewarded it. The judge has another
architecture, another seed and no part in any training, so that its scores are independent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from sampler.bundled import FOLDER
from sampler.bundled.classifier import IMAGE_SIZE, Logits

PATCH, WIDTHS, DEPTHS = 4, (48, 96), (3, 2)


class _Residual(nn.Module):
    """x + conv(gelu(norm(x))), a 3x3 convolution and a group norm of 8 groups."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.gelu(self.norm(x)))


class Judge(nn.Module):
    """A residual network on patches of 4 x 4 pixels with group norms and three linear heads.

    Images are [B, 3, H, W] with values in [0, 1]; any size is resized to 64 x 64. The feature is
    the mean and the maximum over places of the last layer, [B, 192].
    """

    def __init__(
        self,
        concepts: int,
        styles: int,
        backgrounds: int,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, stride = 3, PATCH
        for width, depth in zip(widths, depths, strict=True):
            layers.append(nn.Conv2d(channels, width, stride, stride))
            layers += [_Residual(width) for _ in range(depth)]
            channels, stride = width, 2
        self.body = nn.Sequential(*layers, nn.GroupNorm(8, channels), nn.GELU())
        sizes = {"concept": concepts, "style": styles, "background": backgrounds}
        self.heads = nn.ModuleDict({k: nn.Linear(2 * channels, n) for k, n in sizes.items()})

    def features(self, images: Tensor) -> Tensor:
        """Compute the feature [B, 192] of images [B, 3, H, W] in [0, 1]."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        places = self.body(images * 2 - 1).flatten(2)
        return torch.cat([places.mean(2), places.amax(2)], 1)

    def forward(self, images: Tensor) -> Logits:
        """Compute the three heads' logits of images [B, 3, H, W] in [0, 1]."""
        features = self.features(images)
        return Logits(*(self.heads[name](features) for name in Logits._fields))


def load(folder: Path | str = FOLDER / "judge") -> Judge:
    """Load the judge of a folder (config.json, model.safetensors), float32, in eval mode."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = (len(config[key]) for key in ("concepts", "styles", "backgrounds"))
    model = Judge(*sizes, widths=config["widths"], depths=config["depths"])
    model.load_state_dict(
        {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    )
    return model.eval().requires_grad_(False)
