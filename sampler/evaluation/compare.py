"""Rows of an evaluation: means with intervals, and paired differences of two settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sampler.core.errors import UsageError
from sampler.evaluation.intervals import (
    Difference,
    Interval,
    cluster_means,
    interval,
    paired,
    pooled,
)
from sampler.evaluation.pictures import Picture
from sampler.evaluation.scoring import Scored, batches

DRIFT = "drift"


@dataclass(frozen=True)
class Row:
    """One score of an evaluation.

    mean over prompts of the means of their images, weighted where the scorer has weights (the
    categories of dpg); interval: 95 %, None for one prompt and for
    measures of whole sets; prompts, images: numbers. other, difference: mean of the run that it is
    compared with, and the paired difference, first − other.
    """

    scorer: str
    mean: float | None
    interval: Interval | None
    prompts: int
    images: int
    other: float | None = None
    difference: Difference | None = None

    def plain(self) -> dict[str, Any]:
        """Return plain data, one flat record."""
        low, high = self.interval or (None, None)
        record: dict[str, Any] = {
            "scorer": self.scorer, "mean": self.mean, "low": low, "high": high,
            "prompts": self.prompts, "images": self.images,
        }  # fmt: skip
        if self.other is not None:
            record["other"] = self.other
        if (gap := self.difference) is not None:
            low, high = gap.interval or (None, None)
            record |= {
                "difference": gap.mean, "difference_low": low, "difference_high": high,
                "wins": gap.wins, "ties": gap.ties, "losses": gap.losses, "verdict": gap.verdict,
            }  # fmt: skip
        return record


def rows_of(scored: Scored, other: Scored | None = None) -> list[Row]:
    """Build the rows of an evaluation, in the order of its scorers.

    With another run, both are cut to what they share: images of equal prompt and seed, or else
    equal prompts. Raises UsageError where they share nothing.
    """
    if other is None:
        return [*_alone(scored)]
    own, others = shared(scored.source.pictures, other.source.pictures)
    rows = []
    for name, values in scored.images.items():
        first, count = _means(scored, values, own)
        second, _ = _means(other, other.images[name], others)
        if both := set(first) & set(second):
            sides = [{k: v for k, v in side.items() if k in both} for side in (first, second)]
            rows.append(_compared(name, sides[0], sides[1], count, scored.weights.get(name)))
    for name, values in scored.prompts.items():
        if both := sorted(set(values) & set(other.prompts.get(name, {}))):
            sides = [{k: side[k] for k in both} for side in (values, other.prompts[name])]
            rows.append(_compared(name, sides[0], sides[1], len(own)))
    for name, value in scored.sets.items():
        count = len(scored.source.pictures)
        rows.append(Row(name, value, None, len(scored.source.prompts), count, other.sets[name]))
    return [*rows, *_drift(scored, other, own, others)]


def _alone(scored: Scored) -> list[Row]:
    pictures, rows = scored.source.pictures, []
    for name, values in scored.images.items():
        by_name, count = _means(scored, values, range(len(pictures)))
        if means := [*by_name.values()]:
            weights = _in_order(scored.weights.get(name), by_name)
            mean, bounds = pooled(means, weights), interval(means, weights)
            rows.append(Row(name, mean, bounds, len(means), count))
    for name, by_prompt in scored.prompts.items():
        means = [*by_prompt.values()]
        average = sum(means) / len(means)
        rows.append(Row(name, average, interval(means), len(means), len(pictures)))
    for name, value in scored.sets.items():
        rows.append(Row(name, value, None, len(scored.source.prompts), len(pictures)))
    return rows


def shared(first: Sequence[Picture], second: Sequence[Picture]) -> tuple[list[int], list[int]]:
    """Rows of two sets that can be compared: of equal (prompt, seed), else of equal prompt.

    Images without a prompt are matched by their file name. Raises UsageError for none.
    """
    for key in (lambda p: (p.cluster, p.seed), lambda p: p.cluster):
        keys = [[key(p) for p in pictures] for pictures in (first, second)]
        both = set(keys[0]) & set(keys[1])
        if both:
            own, others = ([i for i, k in enumerate(side) if k in both] for side in keys)
            return own, others
    raise UsageError(
        "The two sets share no prompt and no file name, so that nothing can be compared in pairs: "
        "generate both from the same prompts."
    )


def _means(
    scored: Scored, values: Sequence[float], rows: Sequence[int]
) -> tuple[dict[str, float], int]:
    """Return the mean of each prompt's images, and their number; those without a score are left
    out, such as images whose prompt has no question of a category."""
    known = [i for i in rows if math.isfinite(values[i])]
    if not known:
        return {}, 0
    clusters = [scored.source.pictures[i].cluster for i in known]
    names, means = cluster_means(clusters, [values[i] for i in known])
    return dict(zip(map(str, names), means.tolist(), strict=True)), len(known)


def _compared(
    name: str,
    first: Mapping[str, float],
    second: Mapping[str, float],
    images: int,
    of_prompts: Mapping[str, float] | None = None,
) -> Row:
    names = sorted(first)
    a, b = [first[k] for k in names], [second[k] for k in names]
    w = _in_order(of_prompts, names)
    mean, other = pooled(a, w), pooled(b, w)
    return Row(name, mean, interval(a, w), len(names), images, other, paired(a, b, w))


def _in_order(weights: Mapping[str, float] | None, names: Iterable[str]) -> list[float] | None:
    return None if weights is None else [weights[name] for name in names]


def _drift(scored: Scored, other: Scored, own: Sequence[int], others: Sequence[int]) -> list[Row]:
    """Mean squared difference of the pixels of equal (prompt, seed), where sizes agree."""
    matched = {(p.cluster, p.seed): p for p in (other.source.pictures[i] for i in others)}
    clusters, values = [], []
    for picture in (scored.source.pictures[i] for i in own):
        twin = matched.get((picture.cluster, picture.seed))
        if twin is None:
            continue
        made = [images for _, images in batches([picture, twin])]
        if len(made) == 1:  # of one size
            clusters.append(picture.cluster)
            values.append(float(torch.mean((made[0][0] - made[0][1]) ** 2)))
    if not values:
        return []
    _, means = cluster_means(clusters, values)
    return [Row(DRIFT, float(means.mean()), interval(means), len(means), len(values))]
