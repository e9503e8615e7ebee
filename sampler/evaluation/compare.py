"""Rows of an evaluation: means with intervals, and paired differences of two settings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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

    With another run, both are cut to what they share (see `shared`). Raises UsageError where they
    share nothing.
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
            rows.append(_compared(name, sides[0], sides[1], len(scored.measured or own)))
    for name, value in scored.sets.items():
        rows.append(replace(_of_set(scored, name, value), other=other.sets[name]))
    return [*rows, *_drift(scored.source.pictures, other.source.pictures)]


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
    return [*rows, *(_of_set(scored, name, value) for name, value in scored.sets.items())]


def _of_set(scored: Scored, name: str, value: float | None) -> Row:
    pictures = scored.source.pictures
    measured = [pictures[i] for i in scored.measured] or pictures
    return Row(name, value, None, len({p.cluster for p in measured}), len(measured))


def shared(first: Sequence[Picture], second: Sequence[Picture]) -> tuple[list[int], list[int]]:
    """Rows of two sets that can be compared: of equal prompt and seed, else of equal prompt.

    File names stand for prompts and seeds that are not known. Raises UsageError for none.
    """
    for key in (lambda p: p.pair, lambda p: p.cluster):
        keys = [[key(p) for p in pictures] for pictures in (first, second)]
        both = set(keys[0]) & set(keys[1])
        if both:
            own, others = ([i for i, k in enumerate(side) if k in both] for side in keys)
            return own, others
    raise UsageError(
        "The two sets share no prompt and no file name, so that nothing can be compared in pairs: "
        "generate both from the same prompts."
    )


def equal_numbers(
    first: Sequence[Picture], second: Sequence[Picture]
) -> tuple[list[int], list[int]]:
    """Rows of two sets that can be compared, cut to the first ones of every prompt of which both
    have as many: measures of sets depend on the number of images."""
    sides = first, second
    rows = shared(*sides)
    counts = [Counter(side[i].cluster for i in own) for side, own in zip(sides, rows, strict=True)]
    left = [counts[0] & counts[1], counts[0] & counts[1]]
    found: tuple[list[int], list[int]] = [], []
    for side, own, wanted, kept in zip(sides, rows, left, found, strict=True):
        for i in own:
            if wanted[side[i].cluster] > 0:
                wanted[side[i].cluster] -= 1
                kept.append(i)
    return found


def twins(first: Sequence[Picture], second: Sequence[Picture]) -> list[tuple[Picture, Picture]]:
    """Images of equal prompt and seed, of which the second set has one."""
    counts = Counter(p.pair for p in second)
    single = {p.pair: p for p in second if counts[p.pair] == 1}
    return [(p, single[p.pair]) for p in first if p.pair in single]


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


def _drift(first: Sequence[Picture], second: Sequence[Picture]) -> list[Row]:
    """Mean squared difference of the pixels of images of equal prompt and seed, and of one size."""
    clusters, values = [], []
    for pair in twins(first, second):
        made = [images for _, images in batches(pair)]
        if len(made) == 1:  # of one size
            clusters.append(pair[0].cluster)
            values.append(float(torch.mean((made[0][0] - made[0][1]) ** 2)))
    if not values:
        return []
    _, means = cluster_means(clusters, values)
    return [Row(DRIFT, float(means.mean()), interval(means), len(means), len(values))]
