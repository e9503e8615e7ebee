"""Number of images that the gradient of a trainer needs, on the bundled model as a flow.

    python -m scripts.study.gradient_noise run --out runs/gradient_noise

Each trainer of S1 of the training study computes the gradient of UPDATES batches of IMAGES images
at the same weights (a learning rate of 1e-12). With g = mean + noise / √n in a batch of n images,
the cosine of two batches is 1 / (1 + N/n): N = n·(1/cosine − 1) is the number of images at which
signal and noise are of equal length. docs/figures/gradient_noise.csv has it for the page of the
training study. A batch's gradient is read from Adam's first moments, which the checkpoints hold.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

import sampler
from scripts.study.finetune import captions, write
from scripts.study.training_cells import CPS, FIT, S1, TRAINED, Cell

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "docs" / "figures" / "gradient_noise.csv"
IMAGES, UPDATES, MICRO, DECAY = 256, 4, 32, 0.9
COLUMNS = ("trainer", "images", "batches", "cosine", "low", "high", "with_nft", "cpu_seconds")
app = typer.Typer(add_completion=False)


@app.callback()
def main() -> None:
    """The noise of gradients."""


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")],
    to: Annotated[Path, typer.Option(help="The table.")] = CSV,
) -> None:
    """Compute the gradients of all trainers; batches that are there are not made again."""
    torch.set_num_threads(1)
    lines, first = list[dict[str, Any]](), None
    for cell in (*S1, CPS):
        folder = out / cell.name.replace(" ", "_")
        spent = _train(cell, folder)
        found = _gradients(folder)
        first = torch.stack(found).mean(0) if first is None else first  # of nft
        pairs = [_cosine(a, b) for a, b in itertools.combinations(found, 2)]
        line = {"cosine": statistics.mean(pairs), "low": min(pairs), "high": max(pairs)}
        line |= {"with_nft": _cosine(torch.stack(found).mean(0), first), "cpu_seconds": spent}
        plain = {k: f"{v:.4g}" for k, v in line.items()}
        lines.append({"trainer": cell.name, "images": IMAGES, "batches": UPDATES, **plain})
        print(lines[-1], flush=True)
    write(to, COLUMNS, lines)


def _train(cell: Cell, folder: Path) -> float:
    """Compute the gradients of a trainer, and return the CPU seconds of all its updates."""
    own = {**FIT, **cell.fit, "lr": 1e-12, "lr_end": 1.0, "batch": IMAGES, "micro": MICRO}
    settings = {**own, "checkpoint_every": 1, "keep": UPDATES, "weight_decay": 0.0}
    engine = sampler.load(cell.model, dtype="float32")
    report = sampler.finetune(
        engine, cell.trainer, cell.reward, captions(TRAINED), folder, UPDATES, settings=settings
    )
    return sum(line["cpu_seconds"] for line in report.log if line["kind"] == "update")


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.cosine_similarity(first, second, dim=0))


def _gradients(folder: Path) -> list[Tensor]:
    """Gradient of every update, up to its length: m = DECAY·(m before) + (1 − DECAY)·g."""
    moments = [torch.zeros(())]
    for file in sorted(folder.glob("checkpoints/*/optimizer.safetensors")):
        state = sorted(load_file(file).items())
        moments.append(torch.cat([v.flatten() for k, v in state if k.endswith(".exp_avg")]))
    return [after - DECAY * before for before, after in itertools.pairwise(moments)]


if __name__ == "__main__":
    app()
