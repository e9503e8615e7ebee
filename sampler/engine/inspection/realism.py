"""Accuracy of a linear probe between real and generated images, with two controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sampler.engine.inspection.features import default_block, features
from sampler.engine.inspection.probe import Probe, Proportion, ridge_probe

Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B, F]
PAIRS = ("generated", "real", "real through the VAE")
_BINS = 24


def log_spectrum(images: Tensor) -> Tensor:
    """Radially averaged log power spectrum per channel [B, 3·24], of images [B, 3, H, W]."""
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images.double() - images.double().mean((-2, -1), keepdim=True)).abs()
    log = (power.square() / (height * width) + 1e-8).log()
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    radius = (rows[:, None].square() + columns.square()).sqrt() / 0.5**0.5
    bins = (radius * _BINS).long().clamp(max=_BINS - 1).flatten().to(images.device)
    sums = log.new_zeros(*images.shape[:2], _BINS).index_add_(2, bins, log.flatten(2))
    return (sums / bins.bincount(minlength=_BINS).clamp(min=1)).flatten(1).float()


@torch.no_grad()
def realism(
    engine: Any, real: Tensor, generated: Tensor, extract: Features, seed: int = 0
) -> tuple[dict[str, Proportion], Probe]:
    """Accuracy of a ridge probe against real images, {pair: share}, and the first probe.

        pairs: generated; other real images; other real images through the VAE

    Each pair has n = min(N/2, M) images a side, of N real and M generated ones, shuffled by the
    seed; half of them fit the probe, half test it. 0.5 is chance. The two controls measure what is
    not due to the sampler: 0.5 ± the interval for real images, and the VAE's own traces. Raises
    ValueError for fewer than eight images a side.

    After CIFAKE: Image Classification and Explainable Identification of AI-Generated Synthetic
    Images (Bird & Lotfi, 2023), arXiv:2303.14126, which trains a convolutional network.
    """
    count = min(len(real) // 2, len(generated))
    if count < 8:
        raise ValueError(
            f"realism: {len(real)} real and {len(generated)} generated images; give at least 16 "
            "real and 8 generated ones."
        )
    adapter = engine.pipeline
    # Folders are sorted by prompt: without an order of chance the halves would differ in content.
    order = torch.Generator().manual_seed(seed)
    real = real[torch.randperm(len(real), generator=order)]
    generated = generated[torch.randperm(len(generated), generator=order)]
    first, other = real[:count], real[count : 2 * count]
    coded = torch.cat([adapter.decode(adapter.latents_of(x)).cpu() for x in other.split(8)])
    base = extract(first)
    sides = dict(zip(PAIRS, (generated[:count], other, coded), strict=True))
    shares: dict[str, Proportion] = {}
    probes: list[Probe] = []
    for pair, images in sides.items():
        probe, shares[pair] = told_apart(base, extract(images))
        probes.append(probe)
    return shares, probes[0]


def told_apart(first: Tensor, second: Tensor) -> tuple[Probe, Proportion]:
    """Probe between features [n, F] of two sets, fitted on the even images, tested on the others.

    Class 1 is the second set.
    """
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(first), len(second)]))
    x = torch.cat([first, second])
    fit = torch.cat([torch.arange(len(first)), torch.arange(len(second))]) % 2 == 0
    probe = ridge_probe(x[fit], labels[fit])
    return probe, probe.accuracy(x[~fit], labels[~fit])


@torch.no_grad()
def evidence(engine: Any, images: Tensor, probe: Probe, name: str) -> Tensor | None:
    """Heat maps [B, h, w] of evidence for generated images; None for features without positions.

        Σ_c w_c/std_c · A_c      A: maps whose means over the image are the features

    Grad-CAM of a linear probe on means (Selvaraju et al., 2017, arXiv:1610.02391), without its
    relu: negative is evidence for a real image.
    """
    if name == "classifier":
        from sampler.bundled import classifier

        model = classifier.load()
        size = (classifier.IMAGE_SIZE, classifier.IMAGE_SIZE)
        small = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        maps = model.body(small * 2 - 1)
    elif name == "blocks":
        block = default_block(engine.pipeline)
        side = 8
        flat = features(engine, images, blocks=(block,), pool=side)[block]
        maps = flat.unflatten(1, (-1, side, side))
    else:
        return None
    weight = ((probe.weights[:, 1] - probe.weights[:, 0]) / probe.std).float()
    return torch.einsum("c,bchw->bhw", weight, maps)


def table_of(shares: Mapping[str, Proportion], features: str) -> list[dict[str, Any]]:
    """Table of the shares, one row per pair."""
    return [
        {"features": features, "real against": pair, "told apart": round(s.value, 4),
         "low": round(s.low, 4), "high": round(s.high, 4), "tested": s.count}
        for pair, s in shares.items()
    ]  # fmt: skip
