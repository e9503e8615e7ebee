"""Proximal matching of a network of one number, for docs/figures/prox.csv.

    python -m scripts.study.prox        # a few minutes of one core

Data are Laplace(1), noise N(0, 1), so the proximal operator of −log p is soft thresholding at 1,
and the posterior mean has a closed form. The network is the published one of vectors; stages and
learning rates are those of the trainer `prox_matching`, with larger batches: first the absolute
error, then proximal matching with gamma halved from stage to stage. Errors are means over 801
points of [−4, 4].
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sampler.models.proximal import ProximalConfig, ProximalNetwork
from sampler.objectives import proximal_gamma, proximal_matching_loss

DOCS = Path(__file__).resolve().parents[2] / "docs"
POINTS = torch.linspace(-4, 4, 801)[:, None]
SMALLEST, STAGES, LR, FALL = 0.08, 4, 1e-3, 0.1


def soft_threshold(x: Tensor) -> Tensor:
    """Return the proximal operator of |x|."""
    return x.sign() * (x.abs() - 1).clamp(min=0)


def posterior_mean(x: Tensor) -> Tensor:
    """Return E[x0 | x] of Laplace(1) under N(0, 1) noise."""
    x = x.double()
    normal = torch.distributions.Normal(0.0, 1.0)
    plus, minus = (normal.cdf(side).log() for side in (x - 1, -x - 1))
    share = torch.sigmoid((plus - x) - (minus + x))
    return (share * (x - 1) + (1 - share) * (x + 1)).float() + _correction(x, share)


def _correction(x: Tensor, share: Tensor) -> Tensor:
    """Return the mean beyond x ∓ 1 of the two truncated normals of the posterior."""
    normal = torch.distributions.Normal(0.0, 1.0)
    hazards = [normal.log_prob(side).exp() / normal.cdf(side) for side in (x - 1, -x - 1)]
    return (share * hazards[0] - (1 - share) * hazards[1]).float()


def train(
    network: ProximalNetwork, pretraining: int, stage: int, batch: int, seed: int, lr: float = LR
) -> list[dict[str, Any]]:
    """Train the network; return a row of errors per stage."""
    adam = torch.optim.Adam(network.parameters())
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    updates = pretraining + STAGES * stage
    for update in range(updates):
        gamma = proximal_gamma(update, pretraining, stage, STAGES, SMALLEST)
        adam.param_groups[0]["lr"] = lr if gamma is None else lr * FALL
        draws = torch.empty(2, batch, 1).exponential_(generator=generator)
        x0 = draws[0] - draws[1]  # the difference of two exponentials is Laplace
        x = x0 + torch.randn(batch, 1, generator=generator)
        proximal_matching_loss(network(x), x0, gamma).mean().backward()
        adam.step()
        adam.zero_grad()
        network.clip()
        after = proximal_gamma(update + 1, pretraining, stage, STAGES, SMALLEST)
        if after != gamma or update == updates - 1:
            rows.append({"gamma": gamma or "L1", "updates": update + 1, **errors(network)})
    return rows


def errors(network: ProximalNetwork) -> dict[str, float]:
    """Return mean distances to proximal operator and posterior mean, and the least slope."""
    with torch.no_grad():
        out = network(POINTS)
    slopes = out.diff(dim=0) / POINTS.diff(dim=0)
    return {
        "soft_threshold": round(float((out - soft_threshold(POINTS)).abs().mean()), 4),
        "posterior_mean": round(float((out - posterior_mean(POINTS)).abs().mean()), 4),
        "least_slope": round(float(slopes.min()), 4),
    }


def main(
    pretraining: Annotated[int, typer.Option(help="Updates of the absolute error.")] = 4000,
    stage: Annotated[int, typer.Option(help="Updates of each gamma.")] = 5000,
    batch: Annotated[int, typer.Option(help="Numbers per update.")] = 5000,
    seed: Annotated[int, typer.Option(help="Of the first weights and the data.")] = 1,
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
) -> None:
    """Train the network and write the CSV."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = ProximalNetwork(ProximalConfig((1,), hidden=32, layers=2))
    rows = train(network, pretraining, stage, batch, seed)
    with (docs / "figures" / "prox.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
