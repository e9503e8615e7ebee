"""Estimates that pipelines make of the network's output of every branch before they guide.

A pipeline may turn each branch's output O at x into

    x0 = skip·x + out·O         skip, out: functions of sigma

and give its scheduler the guided x0, or (x − x0)/sigma, which is eps where x = x0 + sigma·eps and
the velocity where x = (1 − sigma)·x0 + sigma·eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

SLOPES = ("eps", "velocity")  # kinds that are (x − x0)/sigma
LEAST = 0.05  # of the sigma that PRXPixelPipeline divides by


@dataclass(frozen=True)
class Preconditioning:
    """Estimate of a branch from its network output.

    kind: what the scheduler is given, "x0" or one of SLOPES. network: how x0 is made of the output:

        "x0"        the output itself
        "karras"    skip = d²/(sigma² + d²), out = sigma·d/sqrt(sigma² + d²), d = `data` the
                    standard deviation of the data (Karras et al., 2022, arXiv:2206.00364, table 1)
        "velocity"  skip = 1/(1 + sigma), out = −sigma·skip, of x/(1 + sigma) (Cosmos-Predict2)

    least: of the sigma that x − x0 is divided by.
    """

    kind: str
    network: Literal["x0", "karras", "velocity"]
    data: float = 1.0
    least: float = 0.0

    def factors(self, sigma: float) -> tuple[float, float]:
        """skip and out at a level."""
        if self.network == "x0":
            return 0.0, 1.0
        if self.network == "velocity":
            return 1 / (1 + sigma), -sigma / (1 + sigma)
        total = sigma * sigma + self.data * self.data
        return self.data * self.data / total, sigma * self.data / total**0.5

    def estimate(self, block: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Estimate of a branch as the scheduler would be given it."""
        skip, out = self.factors(sigma)
        x0 = skip * x.float() + out * block.float()
        return x0 if self.kind == "x0" else (x.float() - x0) / max(sigma, self.least)

    def x0(self, m: Tensor, x: Tensor, sigma: float) -> Tensor:
        """x0 of what the scheduler is given; its float32 is that of the pipeline's own x0."""
        return estimated_x0(self.kind, m, x, max(sigma, self.least))


def estimated_x0(kind: str, m: Tensor, x: Tensor, sigma: float) -> Tensor:
    """x0 of what a scheduler is given, "x0" or one of SLOPES."""
    return m if kind == "x0" else x - sigma * m


def preconditionings(
    kind: str, sigma: float, exploding: bool, data: float
) -> Iterator[Preconditioning]:
    """Estimates that a scheduler may be given at a level, simplest first.

    exploding: x = x0 + sigma·eps. data: standard deviation of the data in the scheduler's
    configuration.
    """
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
