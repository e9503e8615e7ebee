"""Estimates that pipelines make of the network's output of every branch before they guide.

A pipeline may turn each branch's output O at x into

    x0 = skip·x + out·O         skip, out: functions of sigma

and give its scheduler the guided x0, or (x − x0)/sigma, which is eps where x = x0 + sigma·eps and
the velocity where x = (1 − sigma)·x0 + sigma·eps, or v = (alpha·x − x0)/sigma where
x = alpha·x0 + sigma·eps with alpha = sqrt(1 − sigma²).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

SLOPES = ("eps", "velocity")  # kinds that are (x − x0)/sigma
LEAST = 0.05  # of the sigma that PRXPixelPipeline divides by


@dataclass(frozen=True)
class Preconditioning:
    """Estimate of a branch from its network output.

    kind: what the scheduler is given, "x0", "v" or one of SLOPES. network: how x0 is made of the
    output:

        "x0"        the output itself
        "karras"    skip = d²/(sigma² + d²), out = sigma·d/sqrt(sigma² + d²), d = `data` the
                    standard deviation of the data (Karras et al., 2022, arXiv:2206.00364, table 1)
        "velocity"  skip = 1/(1 + sigma), out = −sigma·skip, of x/(1 + sigma) (Cosmos-Predict2)
        "flow"      skip = 1/(alpha + sigma), out = −sigma·d·skip: the velocity of a flow at the
                    level sigma/(alpha + sigma), of x/(d·(alpha + sigma)) (SANA-Sprint)

    least: of the sigma that x − x0 is divided by.
    """

    kind: str
    network: Literal["x0", "karras", "velocity", "flow"]
    data: float = 1.0
    least: float = 0.0

    def factors(self, sigma: float) -> tuple[float, float]:
        """skip and out at a level."""
        if self.network == "x0":
            return 0.0, 1.0
        if self.network == "velocity":
            return 1 / (1 + sigma), -sigma / (1 + sigma)
        if self.network == "flow":
            total = alpha_of(sigma) + sigma
            return 1 / total, -sigma * self.data / total
        total = sigma * sigma + self.data * self.data
        return self.data * self.data / total, sigma * self.data / total**0.5

    def estimate(self, block: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Estimate of a branch as the scheduler would be given it."""
        skip, out = self.factors(sigma)
        x0 = skip * x.float() + out * block.float()
        if self.kind == "x0":
            return x0
        alpha = alpha_of(sigma) if self.kind == "v" else 1.0
        return (alpha * x.float() - x0) / max(sigma, self.least)

    def x0(self, m: Tensor, x: Tensor, sigma: float) -> Tensor:
        """x0 of what the scheduler is given; its float32 is that of the pipeline's own x0."""
        return estimated_x0(self.kind, m, x, max(sigma, self.least))


def alpha_of(sigma: float) -> float:
    """alpha of a variance-preserving level."""
    return math.sqrt(max(0.0, 1 - sigma * sigma))


def estimated_x0(kind: str, m: Tensor, x: Tensor, sigma: float) -> Tensor:
    """x0 of what a scheduler is given, "x0", "v" or one of SLOPES."""
    if kind == "x0":
        return m
    return (alpha_of(sigma) if kind == "v" else 1.0) * x - sigma * m


def preconditionings(
    kind: str, sigma: float, exploding: bool, data: float
) -> Iterator[Preconditioning]:
    """Estimates that a scheduler may be given at a level, simplest first.

    exploding: x = x0 + sigma·eps. data: standard deviation of the data in the scheduler's
    configuration.
    """
    if sigma > 0 and kind == "v":
        yield Preconditioning(kind, "flow", data)
    if sigma <= 0 or kind not in ("x0", *SLOPES):
        return
    if kind != "x0":
        yield Preconditioning(kind, "x0")
        if sigma < LEAST:
            yield Preconditioning(kind, "x0", least=LEAST)
    if exploding:
        yield Preconditioning(kind, "velocity")
        for one in dict.fromkeys((data, 1.0)):
            yield Preconditioning(kind, "karras", one)
