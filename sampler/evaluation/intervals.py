"""Confidence intervals by bootstrap over prompts, and paired differences of two settings."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 20_26
_BLOCK = 250  # resamples at once, so that the weights of many prompts fit memory

Interval = tuple[float, float]


class Difference(NamedTuple):
    """Paired difference of two means, with the clusters in which it is > 0, = 0 and < 0.

    interval is None for a single cluster.
    """

    mean: float
    interval: Interval | None
    wins: int
    ties: int
    losses: int

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" where the interval leaves out 0, else "not shown"."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "not shown"
        return "higher" if self.mean > 0 else "lower"


def cluster_means(
    clusters: Sequence[Hashable], values: ArrayLike
) -> tuple[list[Hashable], NDArray[np.float64]]:
    """Compute the mean of every cluster; returns (clusters in sorted order, means)."""
    data = np.asarray(values, dtype=np.float64)
    names = sorted(set(clusters), key=str)
    place = {name: i for i, name in enumerate(names)}
    index = np.array([place[name] for name in clusters])
    sums = np.bincount(index, data, len(names))
    return names, sums / np.bincount(index, minlength=len(names))


def resampled(means: ArrayLike, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """Draw the clusters with replacement, and compute the means of the draws.

    means: [n], or [n, k] for k quantities of the same clusters. Returns [resamples] or [resamples,
    k]. The draws are a function of n, so that equal data gives equal intervals.
    """
    data = np.asarray(means, dtype=np.float64)
    n = len(data)
    draw = np.random.default_rng([SEED, n])
    found = [
        draw.multinomial(n, np.full(n, 1 / n), min(_BLOCK, resamples - done)) @ data / n
        for done in range(0, resamples, _BLOCK)
    ]
    return np.concatenate(found)


def bootstrap(means: ArrayLike, resamples: int = RESAMPLES) -> NDArray:
    """Compute the percentile interval of the mean of cluster means.

    Clusters are drawn with replacement, so that images of one prompt stay together: they are not
    independent, and a bootstrap over images gives intervals that are too narrow.

    means: [n], or [n, k] for k data sets. Returns [2] or [2, k], low and high.
    Source: An Introduction to the Bootstrap (Efron & Tibshirani, 1993), chapter 13.
    """
    tail = (1 - LEVEL) / 2
    return np.quantile(resampled(means, resamples), (tail, 1 - tail), axis=0)


def pooled(means: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Compute the mean of cluster means, Σ w·m/Σ w; all weights are 1 by default."""
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    return float(np.average(np.asarray(means, dtype=np.float64), weights=w))


def interval(means: ArrayLike, weights: ArrayLike | None = None) -> Interval | None:
    """Compute the 95 % interval of the mean of cluster means; None for a single cluster.

    weights: of the clusters, as in `pooled`, above 0; they are drawn together with the means.
    """
    data = np.asarray(means, dtype=np.float64)
    if len(data) < 2:
        return None
    if weights is None:
        low, high = bootstrap(data)
    else:
        w = np.asarray(weights, dtype=np.float64)
        sums = resampled(np.stack([w * data, w], 1))
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(sums[:, 0] / sums[:, 1], (tail, 1 - tail))
    return float(low), float(high)


def paired(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None) -> Difference:
    """Compare two settings by their means of the same clusters, first − second.

    Differences are taken inside each cluster before clusters are drawn: what a prompt and its seeds
    contribute to both cancels. weights: of the clusters, as in `interval`.
    """
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    signs = [int((sign * gaps > 0).sum()) for sign in (1, -1)]
    return Difference(
        pooled(gaps, weights),
        interval(gaps, weights),
        signs[0],
        len(gaps) - sum(signs),
        signs[1],
    )
