"""Mode coverage of one-step students, for every f-divergence and noise range.

    python -m scripts.study.fdistill mixture     # docs/figures/f_distill_mixture.csv, .png
    python -m scripts.study.fdistill document    # the tables of docs/f_distill.md

Part (b), students of the bundled model, is scripts/study/students.py.

The teacher is p = N((-3, 0), I/4)/2 + N((3, 0), I/4)/2 in two dimensions, the student x = m + L·z
from m = (2, 0), L = I/2, so that it starts on one of two modes. Scores and ratio are exact, at
x + sigma·eps with sigma log-uniform in a range; steps are weighted by sigma². All runs of a range
go in step, in one batch of parameters.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import sampler
from sampler.guidance.f_divergence import WEIGHTS
from scripts.study import students as study_students

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
RANGES = ((0.05, 0.5), (0.5, 1.5), (0.5, 3.0))
MODES, VARIANCE = ((-3.0, 0.0), (3.0, 0.0)), 0.25
BATCH, STEPS, LR = 1024, 900, 0.02

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Students:
    """R students x = m + L·z: m [R, 2], L [R, 2, 2]."""

    m: Tensor
    scale: Tensor

    def samples(self, z: Tensor) -> Tensor:
        """z [R, B, 2] to x [R, B, 2]."""
        return self.m[:, None] + z @ self.scale.transpose(1, 2)

    def left(self) -> Tensor:
        """The mass [R] left of 0, exactly."""
        deviation = self.scale.detach()[:, 0].norm(dim=1)
        return 0.5 * torch.special.erfc(self.m.detach()[:, 0] / deviation / math.sqrt(2))


def teacher(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(log p [R, B], grad log p [R, B, 2]) of the mixture with noise sigma [R, B]."""
    variance = VARIANCE + sigma.square()
    means = torch.tensor(MODES, dtype=x.dtype)
    gaps = x[:, :, None] - means
    logs = -gaps.square().sum(-1) / (2 * variance[..., None])
    logs = logs - torch.log(4 * math.pi * variance)[..., None]
    weights = logs.softmax(-1)[..., None]
    return logs.logsumexp(-1), -(weights * gaps).sum(-2) / variance[..., None]


def student(x: Tensor, sigma: Tensor, of: Students) -> tuple[Tensor, Tensor]:
    """(log q, grad log q) of N(m, L·L' + sigma²·I)."""
    eye = torch.eye(2, dtype=x.dtype)
    covariance = of.scale @ of.scale.transpose(1, 2)
    covariance = covariance[:, None] + sigma.square()[..., None, None] * eye
    gap = x - of.m[:, None]
    score = -torch.linalg.solve(covariance, gap[..., None])[..., 0]
    log = 0.5 * (gap * score).sum(-1) - 0.5 * torch.linalg.det(covariance).log()
    return log - math.log(2 * math.pi), score


def trained(
    names: list[str],
    sigmas: tuple[float, float],
    seed: int,
    clamp: tuple[float, float] = (0.1, 20.0),
    normalise: bool = True,
    batch: int = BATCH,
) -> Students:
    """One student per name, after all steps; h(r) is divided by its mean over the batch."""
    generator, count = torch.Generator().manual_seed(seed), len(names)
    m = torch.tensor([[2.0, 0.0]]).repeat(count, 1).requires_grad_(True)
    scale = (0.5 * torch.eye(2)).repeat(count, 1, 1).requires_grad_(True)
    students = Students(m, scale)
    adam = torch.optim.Adam([m, scale], lr=LR, betas=(0.5, 0.99))
    low, high = (math.log(s) for s in sigmas)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        # the same numbers for every divergence: what differs is the weight alone
        z, eps = (torch.randn(1, batch, 2, generator=generator) for _ in range(2))
        sigma = torch.exp(low + (high - low) * torch.rand(1, batch, generator=generator))
        sigma = sigma.expand(count, -1)
        x = students.samples(z.expand(count, -1, -1))
        with torch.no_grad():
            noisy = x + sigma[..., None] * eps
            (log_p, score_p), (log_q, score_q) = (
                teacher(noisy, sigma),
                student(noisy, sigma, students),
            )
            r = (log_p - log_q).exp().clamp(*clamp)
            h = torch.stack([sampler.f_weight(n, r[k]) for k, n in enumerate(names)])
            h = h / h.mean(1, keepdim=True) if normalise else h
            field = -(sigma.square() * h)[..., None] * (score_p - score_q)
        adam.zero_grad()
        (x * field).sum(-1).mean(1).sum().backward()
        adam.step()
    return students


@app.command()
def mixture(seeds: int = 4) -> None:
    """Run all divergences, ranges and seeds."""
    rows, shown = [], {}
    for sigmas in RANGES:
        for seed in range(seeds):
            students = trained(list(WEIGHTS), sigmas, seed)
            shown.setdefault(sigmas, students)
            deviations = torch.linalg.svdvals(students.scale.detach())
            for k, (name, left) in enumerate(zip(WEIGHTS, students.left().tolist(), strict=True)):
                row = {"f": name, "sigma_min": sigmas[0], "sigma_max": sigmas[1], "seed": seed}
                wide, thin = deviations[k].tolist()
                row |= {"left": round(left, 4), "wide": round(wide, 3), "thin": round(thin, 3)}
                rows.append(row)
        print(sigmas, "done", flush=True)
    FIGURES.mkdir(parents=True, exist_ok=True)
    with (FIGURES / "f_distill_mixture.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _plot(shown)


def _plot(shown: dict[tuple[float, float], Students]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(WEIGHTS)
    figure, axes = pyplot.subplots(
        len(shown), len(names), figsize=(2 * len(names), 1.7 * len(shown)), squeeze=False
    )
    generator = torch.Generator().manual_seed(0)
    real = torch.tensor(MODES)[torch.randint(2, (400,), generator=generator)]
    real = real + math.sqrt(VARIANCE) * torch.randn(400, 2, generator=generator)
    for row, (sigmas, students) in enumerate(shown.items()):
        z = torch.randn(1, 400, 2, generator=generator).expand(len(names), -1, -1)
        made = students.samples(z).detach()
        for column, name in enumerate(names):
            axis: Any = axes[row][column]
            axis.scatter(*real.T, s=2, color="0.75", linewidths=0)
            axis.scatter(*made[column].T, s=2, color="tab:red", linewidths=0)
            axis.set(xlim=(-7, 7), ylim=(-4, 4), xticks=[], yticks=[])
            if row == 0:
                axis.set_title(name)
            if column == 0:
                axis.set_ylabel(f"sigma {sigmas[0]:g}..{sigmas[1]:g}")
    figure.suptitle("Teacher (grey) and one-step student (red), which starts on the right")
    figure.tight_layout()
    figure.savefig(FIGURES / "f_distill_mixture.png", dpi=110)


@app.command()
def document(page: Path = ROOT / "docs" / "f_distill.md") -> None:
    """Write the tables between their marks in the page."""
    text = page.read_text(encoding="utf-8")
    tables = {
        "mixture": _mixture_table(),
        "cost": _cost_table(),
        "students": study_students.table(),
    }
    for name, table in tables.items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(marks, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
        assert count == 1, name
    page.write_text(text, encoding="utf-8")


def _cost_table() -> str:
    """Read the costs measured by scripts/bench/f_distill.py."""
    with (FIGURES / "f_distill_cost.csv").open(newline="") as file:
        seconds = {row["what"]: float(row["seconds"]) for row in csv.DictReader(file)}
    lines = [
        "| CPU milliseconds | teacher, 20 steps of CFG | student | ratio |",
        "|---|---|---|---|",
    ]
    for count in (1, 8):
        slow, fast = (
            seconds[f"{who}, {count} images"] for who in ("teacher, 20 steps of CFG", "student")
        )
        what = "one image" if count == 1 else f"{count} images together"
        lines.append(f"| {what} | {1000 * slow:.0f} | {1000 * fast:.0f} | {slow / fast:.1f} |")
    whole = seconds["update of the student"]
    parts = seconds["its parts: two passes and the teacher"]
    more = f"{100 * (whole / parts - 1):+.1f} %"
    lines += [
        "",
        f"A student's update takes {1000 * whole:.0f} ms, its parts {1000 * parts:.0f} ms",
    ]
    return "\n".join(lines) + f" ({more}).\n"


def _mixture_table() -> str:
    with (FIGURES / "f_distill_mixture.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ranges = list(dict.fromkeys((row["sigma_min"], row["sigma_max"]) for row in rows))
    head = " | ".join(f"sigma {low}–{high}" for low, high in ranges)
    lines = [f"| f | {head} |", "|---" * (len(ranges) + 1) + "|"]
    for name in dict.fromkeys(row["f"] for row in rows):
        cells = []
        for low, high in ranges:
            chosen = [
                float(row["left"])
                for row in rows
                if (row["f"], row["sigma_min"], row["sigma_max"]) == (name, low, high)
            ]
            least, most = f"{min(chosen):.2f}", f"{max(chosen):.2f}"
            cells.append(least if least == most else f"{least}–{most}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
