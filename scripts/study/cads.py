"""Diversity against accuracy of `cads`, on the bundled model and on its LCM.

    python -m scripts.study.cads       writes docs/figures/cads.csv

8 prompts with 8 seeds each, for each of three sets of prompts. Diversity: the mean of 1 − cosine
between the classifier's features of two images of one prompt. Accuracy: concept and background as
asked. The bundled model takes 20 DDIM steps with CFG at scale 3, the LCM 4 steps.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sampler
from sampler.bundled import classifier, prompts
from sampler.bundled.measures import extracted_features

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "cads.csv"
SETS, PROMPTS, SEEDS = 3, 8, 8
CFG: dict[str, Any] = {"name": "cfg", "scale": 3.0}
MODELS: dict[str, dict[str, Any]] = {
    "bundled": {"steps": 20, "sampler": "ddim"},
    "bundled-lcm": {"steps": 4},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "without": {},
    "tau2 0.9, tau1 0.6 (default)": {},
    "tau2 0.9, tau1 0.6, noise 0.1": {"noise_scale": 0.1},
    "tau2 0.8, tau1 0.5": {"tau1": 0.5, "tau2": 0.8},
    "tau2 0.7, tau1 0.4": {"tau1": 0.4, "tau2": 0.7},
    "uniform 0.1": {"form": "uniform"},
    "uniform 0.5": {"form": "uniform", "strength": 0.5},
    "uniform 1": {"form": "uniform", "strength": 1.0},
}


def diversity(features: Tensor) -> float:
    """Mean over prompts of 1 − cosine between two of a prompt's images, features [P, S, F]."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    count = features.shape[1]
    return float(1 - (cosine.sum((1, 2)) - count).mean() / (count * (count - 1)))


def rule_of(model: str, name: str) -> Any:
    """The rule of a setting on a model: the LCM takes its scale as an input."""
    inner: Any = CFG if model == "bundled" else {"name": "embedded"}
    return inner if name == "without" else {"name": "cads", "rule": inner, **SETTINGS[name]}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table in docs/guidance.md: means of the sets of prompts."""
    lines = [
        "| setting | bundled: diversity | accuracy | bundled-lcm: diversity | accuracy |",
        "|---|---|---|---|---|",
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = [setting]
        for model in MODELS:
            own = [row for row in rows if (row["model"], row["setting"]) == (model, setting)]
            for key in ("diversity", "accuracy"):
                cells.append(f"{sum(float(row[key]) for row in own) / len(own):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Make the images and write a row per model, setting and set of prompts."""
    torch.set_num_threads(1)
    judge = classifier.load()
    with FIGURE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "setting", "set", "images", "diversity", "accuracy"])
        for model, run in MODELS.items():
            engine = sampler.load(model)
            for name in SETTINGS:
                for part in range(SETS):
                    asked = prompts(PROMPTS, 1000 + part * PROMPTS)
                    made = engine.generate(
                        [p.text for p in asked],
                        n=SEEDS,
                        seeds=100 * part,
                        guidance=rule_of(model, name),
                        batch_size=16,
                        output="tensor",
                        **run,
                    )
                    features = extracted_features(judge, made.images.float())
                    logits = judge.logits(features)
                    wanted = torch.tensor([[p.concept, p.background] for p in asked])
                    found = torch.stack([logits.concept.argmax(1), logits.background.argmax(1)], 1)
                    right = (found == wanted.repeat_interleave(SEEDS, 0)).all(1).float().mean()
                    spread = diversity(features.view(PROMPTS, SEEDS, -1))
                    cells = [PROMPTS * SEEDS, f"{spread:.4f}", f"{float(right):.4f}"]
                    writer.writerow([model, name, part, *cells])
                    file.flush()
                    print(model, name, part, *cells, flush=True)


if __name__ == "__main__":
    main()
