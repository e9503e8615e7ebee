"""Accuracy of probes on the features of each block, with baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.core.errors import UsageError
from sampler.engine.inspection.features import features, pooled
from sampler.engine.inspection.probe import Proportion, ridge_probe, wilson

TRAINED = 7  # of ten images


def block_table(
    engine: Any,
    images: Tensor,
    labels: Mapping[str, Sequence[str]],
    shares: Sequence[float],
    blocks: Sequence[str],
    pool: int = 2,
) -> list[dict[str, Any]]:
    """Accuracies of probes, a row per label column, noise level and block.

    Of every ten images in order seven fit the probe and three test it. Baselines without noise:
    pooled latents, raw latents, and the most frequent label of the fitted images ("chance").
    Raises UsageError for a column with fewer than two labels among the fitted images.
    """
    fit = torch.arange(len(images)) % 10 < TRAINED
    classes = {name: _classes(name, values, fit) for name, values in labels.items()}
    rows: list[dict[str, Any]] = []
    for source, share, x in _sources(engine, images, shares, blocks, pool):
        for column, y in classes.items():
            probe = ridge_probe(x[fit], y[fit])
            rows.append(_row(column, source, share, probe.accuracy(x[~fit], y[~fit])))
    for column, y in classes.items():
        common = int(y[fit].mode().values)
        found = wilson(int((y[~fit] == common).sum()), int((~fit).sum()))
        rows.append(_row(column, "chance", None, found))
    return sorted(rows, key=lambda row: row["label"])


def _sources(
    engine: Any, images: Tensor, shares: Sequence[float], blocks: Sequence[str], pool: int
) -> Iterator[tuple[str, float | None, Tensor]]:
    for share in shares:
        for block, x in features(engine, images, share, blocks, pool).items():
            yield block, share, x
    with torch.no_grad():
        z = torch.cat([engine.pipeline.latents_of(part).cpu() for part in images.split(8)])
    yield "pooled latents", None, pooled(z, pool, z.shape[-2:])
    yield "raw latents", None, z.flatten(1)


def _classes(column: str, values: Sequence[str], fit: Tensor) -> Tensor:
    """Class numbers of labels; a label that is not fitted has one that no probe answers."""
    fitted = sorted({value for value, used in zip(values, fit.tolist(), strict=True) if used})
    if len(fitted) < 2 or len(values) < 10:
        raise UsageError(
            f"labels: the column {column!r:.40} has {len(fitted)} labels among the images that fit "
            "the probes; give at least ten images of at least two labels."
        )
    numbers = {value: k for k, value in enumerate(fitted)}
    return torch.tensor([numbers.get(value, -1) for value in values])


def _row(column: str, source: str, share: float | None, found: Proportion) -> dict[str, Any]:
    return {
        "label": column, "features": source, "noise": share, "accuracy": found.value,
        "low": found.low, "high": found.high, "tested": found.count,
    }  # fmt: skip
