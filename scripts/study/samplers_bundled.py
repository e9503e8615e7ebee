"""Samplers on the bundled model: prompt accuracy, Fréchet distance, distance to the exact ODE.

The same prompts and seeds for every sampler, so that differences are the samplers'. Intervals are
95 % of a bootstrap over the images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import sampler
from sampler.bundled import prompts
from sampler.bundled.classifier import (
    feature_statistics,
    frechet_distance,
    load,
    reference_statistics,
)
from sampler.bundled.measures import extracted_features
from sampler.core.binding import network_hash

STEPS = (6, 10, 20)
SCALES = (3.0, 10.0)
REFERENCE = {"steps": 500, "images": 16}
BATCH = 32
BOOTSTRAPS = 200

# In the order of the run: where it is stopped early, the first ones are there.
SAMPLERS: dict[str, Any] = {
    "ddim": "ddim",
    "ghvb 1.8": {"name": "ghvb", "momentum_number": 1.8},
    "dpmpp_2m": "dpmpp_2m",
    "heavy_ball 1.8": {"name": "heavy_ball", "momentum_number": 1.8},
    "unipc": "unipc",
    "ab 2": {"name": "ab", "order": 2},
    "ghvb 3.8": {"name": "ghvb", "momentum_number": 3.8},
    "ab 4": {"name": "ab", "order": 4},
}


def study(done: Sequence[Mapping[str, str]], images: int = 256) -> Iterator[dict[str, Any]]:
    """Yield one row per point that is missing in `done` for this model."""
    engine = sampler.load()
    model = network_hash(engine.pipeline.network)
    known = {(r["model"], r["sampler"], float(r["scale"]), int(r["steps"])) for r in done}
    references: dict[float, Tensor] = {}
    for scale in SCALES:
        for steps in STEPS:
            for name, spec in SAMPLERS.items():
                if (model, name, scale, steps) in known:
                    continue
                if scale not in references:
                    count = min(REFERENCE["images"], images)
                    references[scale] = made(engine, "ddim", scale, REFERENCE["steps"], count)[1]
                started = time.perf_counter()
                pictures, latents = made(engine, spec, scale, steps, images)
                seconds = time.perf_counter() - started
                row = {"model": model, "sampler": name, "scale": scale, "steps": steps}
                row |= {"images": images, "seconds": seconds}
                row |= _figures(pictures, images)
                exact = references[scale]
                gap = (latents[: len(exact)] - exact).square().mean()
                yield row | {"distance": float((gap / exact.square().mean()).sqrt())}


def made(
    engine: sampler.Engine, spec: Any, scale: float, steps: int, count: int
) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and latents of prompt i with seed i."""
    result = engine.generate(
        [prompt.text for prompt in prompts(count)],
        seeds=list(range(count)),
        steps=steps,
        sampler=spec,
        guidance={"name": "cfg", "scale": scale},
        batch_size=BATCH,
        output="tensor",
    )
    return result.images, result.latents


def _figures(pictures: Tensor, count: int) -> dict[str, float]:
    """Concept accuracy and Fréchet distance, each with its confidence interval."""
    model, listed = load(), prompts(count)
    features = extracted_features(model, pictures)
    right = model.logits(features).concept.argmax(1) == torch.tensor([p.concept for p in listed])
    reference = reference_statistics()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (BOOTSTRAPS, count), generator=generator)
    accuracies = torch.stack([right[rows].float().mean() for rows in drawn])
    distances = torch.tensor(
        [frechet_distance(*feature_statistics(features[r]), *reference) for r in drawn[:50]]
    )
    low, high = (accuracies.quantile(q).item() for q in (0.025, 0.975))
    spread = distances.std().item()
    return {
        "accuracy": right.float().mean().item(),
        "accuracy_low": low,
        "accuracy_high": high,
        "frechet": frechet_distance(*feature_statistics(features), *reference),
        "frechet_std": spread,
    }
