"""Decisions of `forecast` per image against one decision for the whole batch, in mixed batches.

    python -m scripts.study.mixed_batch       writes docs/figures/mixed_batch.csv

Batches of 8 on the bundled model whose images differ: CFG at scales 1.5, 3 and 8 in turn, prompts
that it was trained on and hard ones (`scripts.study.trials`) in turn. 20 DDIM steps, float32, one
thread, three seeds. SSIM is to the same run without forecasts. The same tolerances for both kinds
of decision; compare lines of about equal NFE.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sampler
from sampler.guidance import Forecast
from sampler.metrics import ssim
from sampler.types import Branch, GuidanceBase, Prediction
from scripts.study.trials import SEEDS, easy, hard

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "mixed_batch.csv"
BATCH, IMAGES = 8, 24
SCALES = (1.5, 3.0, 8.0)
TOLERANCES = {"rows": (0.006, 0.008, 0.012, 0.016, 0.02), "batch": (0.024, 0.04, 0.06, 0.09, 0.13)}


@dataclass(frozen=True)
class Mixed(GuidanceBase):
    """CFG whose scale is 1.5, 3 or 8 by the position in the batch."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond", "uncond"})

    def plan(self, x: Any, span: Any, cond: Any, state: Any) -> dict[str, Branch]:
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(self, x: Any, preds: Any, span: Any, state: Any) -> tuple[Prediction, Any]:
        cond, count = preds["cond"], len(x)
        scales = torch.tensor([SCALES[i % len(SCALES)] for i in range(count)])
        return cond.like(cond.out + (cond.out - preds["uncond"].out) * (scales - 1)), state


def texts(seed: int) -> list[str]:
    """Prompts of one seed, easy and hard ones in turn."""
    start = seed * IMAGES
    pairs = zip(easy(IMAGES // 2, start), hard(IMAGES // 2, start), strict=True)
    return [asked.text for pair in pairs for asked in pair]


def main() -> None:
    """Make the images and write a row per decision and tolerance: means, and the worst image."""
    torch.set_num_threads(1)
    engine = sampler.load()
    rules: dict[tuple[str, float], Any] = {
        (compact, tolerance): Forecast(rule=Mixed(), compact=compact, tolerance=tolerance)  # pyright: ignore[reportArgumentType]
        for compact, found in TOLERANCES.items()
        for tolerance in found
    }
    same: dict[tuple[str, float], list[float]] = {key: [] for key in rules}
    nfe: dict[tuple[str, float], list[float]] = {key: [] for key in rules}
    for seed in SEEDS:
        run: dict[str, Any] = {
            **{"prompts": texts(seed), "seeds": 1000 * seed, "steps": 20, "sampler": "ddim"},
            **{"batch_size": BATCH, "output": "tensor"},
        }
        plain = engine.generate(**run, guidance=Mixed()).images
        for key, rule in rules.items():
            made = engine.generate(**run, guidance=rule)
            same[key] += ssim(made.images, plain).tolist()
            nfe[key] += made.nfe
    with FIGURE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["decision", "tolerance", "images", "nfe", "ssim", "worst_ssim"])
        for (compact, tolerance), found in same.items():
            count = len(found)
            used = sum(nfe[compact, tolerance]) / count
            cells = [f"{used:.2f}", f"{sum(found) / count:.4f}", f"{min(found):.4f}"]
            writer.writerow([compact, tolerance, count, *cells])
            print(compact, tolerance, count, *cells, flush=True)


if __name__ == "__main__":
    main()
