"""Ridge probe: a linear classifier on features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = tuple(10.0**k for k in range(-4, 4))  # in units of the mean eigenvalue of X·Xᵀ


class Proportion(NamedTuple):
    """A share with its 95 % interval (Wilson's), of `count` trials."""

    value: float
    low: float
    high: float
    count: int


class Probe(NamedTuple):
    """A fitted probe: classes = argmax of (x − mean)/std @ weights + offset."""

    weights: Tensor
    offset: Tensor
    mean: Tensor
    std: Tensor
    penalty: float

    def scores(self, x: Tensor) -> Tensor:
        """Scores [B, K] of features [B, F]."""
        return (x.double() - self.mean) / self.std @ self.weights + self.offset

    def accuracy(self, x: Tensor, labels: Tensor) -> Proportion:
        """Share of right classes, labels [B] of 0 .. K − 1."""
        right = self.scores(x).argmax(1) == labels
        return wilson(int(right.sum()), len(labels))


def wilson(successes: int, count: int) -> Proportion:
    """Share with Wilson's 95 % score interval; Wilson (1927).

    (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n),   z = 1.96
    """
    if count < 1:
        raise ValueError("A share needs at least one trial.")
    z, p = 1.959964, successes / count
    middle = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    norm = 1 + z * z / count
    return Proportion(p, max(0.0, (middle - half) / norm), min(1.0, (middle + half) / norm), count)


def ridge_probe(x: Tensor, labels: Tensor) -> Probe:
    """Fit one-hot targets on features [n, F] by ridge regression, float64.

        W = Xᵀ(X·Xᵀ + λI)⁻¹Y,   X standardised, Y centred

    λ is chosen among PENALTIES by leave-one-out accuracy, in closed form from the leverages h:
    y_i − ŷ_i becomes (y_i − ŷ_i)/(1 − h_i). Equal accuracies take the largest λ. Raises ValueError
    for fewer than two images or classes.
    """
    x, count = x.double(), len(x)
    if count < 2 or x.shape[0] != len(labels) or len(labels.unique()) < 2:
        raise ValueError("A probe needs at least two images of at least two classes.")
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    z = (x - mean) / std
    targets = F.one_hot(labels.long()).double()
    offset = targets.mean(0)
    values, vectors = torch.linalg.eigh(z @ z.T)
    values = values.clamp(min=0)
    rotated = vectors.T @ (targets - offset)
    best: tuple[float, float] = (-1.0, 0.0)
    for share in PENALTIES:
        penalty = share * float(values.mean())
        shrink = values / (values + penalty)
        fitted = vectors @ (shrink[:, None] * rotated)
        leverage = (vectors.square() @ shrink + 1 / count).clamp(max=1 - 1e-9)
        left_out = targets - (targets - offset - fitted) / (1 - leverage)[:, None]
        right = float((left_out.argmax(1) == labels).double().mean())
        best = max(best, (right, penalty))
    weights = z.T @ (vectors @ (rotated / (values + best[1])[:, None]))
    return Probe(weights, offset, mean, std, best[1])
