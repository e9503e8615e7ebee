"""Classify by sampling labels: NoProp on features of the bundled model.

    python docs/examples/noprop.py

The core knows nothing of images. Here x is the embedding u_y of a label (one-hot), noised to

    z_t = alpha_t·u_y + sigma_t·n,   n ~ N(0, I),

and each of T blocks, a small network that sees z_t and the features of an image, is trained by
itself to predict x0, by mean‖block_t(z_t, features) − u_y‖²: no gradient passes between blocks, and
none sees the output of another. The paper weighs this with the growth of alpha²/sigma² over the
step, a constant for each block. Ancestral sampling from pure noise, one evaluation per block, then
gives an embedding, and its largest component the class.

Reference: NoProp: Training Neural Networks without Full Back-propagation or Full
Forward-propagation (Li et al., 2025), arXiv:2503.24322; NoProp-DT.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sampler
from sampler.engine.inspection.probe import ridge_probe

CONCEPTS = ("apple", "car", "flower", "fox", "guitar", "house")


def label_levels(blocks: int = 10) -> list[sampler.Level]:
    """Levels from noise to the embedding, alpha = sin, sigma = cos; `t` is the block's number."""
    angles = [math.pi / 2 * (0.02 + 0.98 * k / blocks) for k in range(blocks)]
    noisy = [sampler.Level(k, math.sin(angle), math.cos(angle)) for k, angle in enumerate(angles)]
    return [*noisy, sampler.Level(blocks, 1.0, 0.0)]


def train(x: Tensor, labels: Tensor, levels: list[sampler.Level], updates: int = 150) -> nn.Module:
    """One block per level but the last, for features [N, F] and labels [N] of 0 .. K − 1."""
    targets = F.one_hot(labels).float()
    classes, blocks = targets.shape[1], nn.ModuleList()
    for level in levels[:-1]:
        block = nn.Sequential(
            nn.Linear(classes + x.shape[1], 64), nn.ReLU(), nn.Linear(64, classes)
        )
        optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3, weight_decay=0.1)
        for _ in range(updates):
            z = level.alpha * targets + level.sigma * torch.randn_like(targets)
            loss = F.mse_loss(block(torch.cat([z, x], 1)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        blocks.append(block)
    return blocks


def classify(blocks: nn.Module, x: Tensor, classes: int, levels: list[sampler.Level]) -> Tensor:
    """Classes [N] of features [N, F]: an embedding is sampled for each row."""

    def predict(z: Tensor, level: sampler.Level, features: Tensor) -> Tensor:
        return blocks.get_submodule(str(int(level.t)))(torch.cat([z, features], 1))

    engine = sampler.Engine(sampler.denoiser(predict, prediction="x0"))
    noise = torch.randn(len(x), classes, generator=torch.Generator().manual_seed(0))
    return engine.run(noise, levels, cond=x, sampler={"name": "ddim", "eta": 1}).argmax(1)


def images_and_labels(engine: sampler.Engine, count: int = 20) -> tuple[Tensor, Tensor]:
    """`count` generated images of each concept, one evaluation each, and their labels."""
    images = engine.generate(list(CONCEPTS), n=count, seeds=0, steps=1, output="tensor").images
    return images, torch.arange(len(CONCEPTS)).repeat_interleave(count)


def main() -> None:
    """Print the accuracy of NoProp and of a ridge probe on the same features."""
    torch.manual_seed(0)
    engine = sampler.load("bundled-student")
    images, labels = images_and_labels(engine)
    (x,) = engine.features(images, pool=1).values()
    fit = torch.arange(len(x)) % 2 == 0
    x = (x - x[fit].mean(0)) / x[fit].std(0)
    levels = label_levels()
    found = classify(train(x[fit], labels[fit], levels), x[~fit], len(CONCEPTS), levels)
    print(f"NoProp: {float((found == labels[~fit]).float().mean()):.3f}")
    probe = ridge_probe(x[fit], labels[fit]).accuracy(x[~fit], labels[~fit])
    print(f"ridge probe: {probe.value:.3f} ({probe.low:.3f} to {probe.high:.3f})")


if __name__ == "__main__":
    main()
