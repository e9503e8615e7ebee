"""Measurements of one point of the guidance study, with bootstrap intervals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler.bundled import classifier, prompts
from sampler.bundled.measures import clipped_share, extracted_features, saturation
from sampler.metrics import ssim
from scripts.study.points import Point

DRAWS = 100


def measured(point: Point, value: dict[str, Any], base: Tensor) -> dict[str, Any]:
    """One row of the CSV; intervals are 95 % bootstrap over the images."""
    model, reference = classifier.load(), classifier.reference_statistics()
    pictures = value["images"]
    asked = prompts(len(pictures))
    with torch.no_grad():
        features = extracted_features(model, pictures)
        logits = model.logits(features)
    concept = logits.concept.argmax(1) == torch.tensor([p.concept for p in asked])
    background = logits.background.argmax(1) == torch.tensor([p.background for p in asked])
    right = (concept & background).double()
    same = ssim(pictures, base[: len(pictures)])

    def distance(rows: Tensor) -> float:
        found = classifier.feature_statistics(features[rows])
        return classifier.frechet_distance(*found, *reference)

    everything = torch.arange(len(pictures))
    row: dict[str, Any] = {
        "point": point.name,
        "study": point.study,
        "images": len(pictures),
        "rows": round(float(value["nfe"].mean()), 2),
        "concept": round(float(concept.double().mean()), 4),
        "background": round(float(background.double().mean()), 4),
    }
    measures = {
        "accuracy": (lambda rows: float(right[rows].mean()), 4),
        "frechet": (distance, 2),
        "ssim": (lambda rows: float(same[rows].mean()), 4),
        "saturation": (lambda rows: saturation(pictures[rows]), 4),
        "clipped": (lambda rows: clipped_share(pictures[rows]), 4),
    }
    g = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(pictures), (len(pictures),), generator=g) for _ in range(DRAWS)]
    for name, (measure, digits) in measures.items():
        values = np.array([measure(rows) for rows in draws])
        found = measure(everything)
        # a resample has fewer distinct images, which shifts distances: centred on the estimate
        low, high = found + np.quantile(values, (0.025, 0.975)) - np.median(values)
        row[name] = round(found, digits)
        row[f"{name}_low"], row[f"{name}_high"] = round(low, digits), round(high, digits)
    row["cpu_seconds_per_image"] = round(value["seconds"] / len(pictures), 3)
    row["model"] = value["model"]
    row["spec"] = json.dumps(point.spec)
    return row
