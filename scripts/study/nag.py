"""The study of `nag` on the bundled few-step model, for docs/figures/nag.csv.

    python -m scripts.study.nag    # about ten minutes of one core

`bundled-lcm`, 4 steps, prompts without a background, negative prompt "on a sky blue background".
SSIM is to the images without a negative prompt; sky blue: share of images whose background the
bundled classifier takes for it. Float32, one thread, batches of 16, three seeds.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sampler
from sampler.bundled import backgrounds, classifier, prompts
from sampler.bundled.measures import clipped_share, extracted_features, saturation
from sampler.metrics import ssim

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS = (0, 1, 2)
AVOIDED = "sky blue"
INNER = {"name": "embedded", "scale": 3.0}


def away(scale: float, tau: float, alpha: float) -> dict[str, Any]:
    """The rule with these settings."""
    return {"name": "nag", "rule": INNER, "scale": scale, "tau": tau, "alpha": alpha}


RULES: dict[str, Any] = {
    "off": INNER,
    "nag 3, 2.5, 0.25": away(3, 2.5, 0.25),
    "nag 5, 2.5, 0.25": away(5, 2.5, 0.25),
    "nag 5, 1.5, 0.5": away(5, 1.5, 0.5),
    "nag 5, 2.5, 0.5": away(5, 2.5, 0.5),
    "nag 11, 3.5, 0.75": away(11, 3.5, 0.75),
    "cfg 2": {"name": "cfg", "scale": 2.0},
}


def main(
    count: Annotated[int, typer.Option(help="Images per rule and seed.")] = 128,
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
) -> None:
    """Make the images and write the CSV."""
    torch.set_num_threads(1)
    engine, model = sampler.load("bundled-lcm"), classifier.load()
    rows = list[dict[str, Any]]()
    for seed in SEEDS:
        plain = None
        for name, rule in RULES.items():
            images, row = _made(engine, rule, seed, count)
            plain = images if plain is None else plain
            rows.append({"rule": name, "seed": seed, **row, **_measured(model, images, plain)})
            print(rows[-1], flush=True)
    with (docs / "figures" / "nag.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _made(engine: Any, rule: Any, seed: int, count: int) -> tuple[Any, dict[str, Any]]:
    texts = [prompt.text.split(" on ")[0] for prompt in prompts(count)]
    negative = None if rule is INNER else f"on a {AVOIDED} background"
    options: dict[str, Any] = {"steps": 4, "output": "tensor", "batch_size": 16}
    began = time.process_time()
    made = engine.generate(texts, negative=negative, seeds=1000 * seed, guidance=rule, **options)
    spent = (time.process_time() - began) / count
    rows = sum(made.nfe) / count
    return made.images, {"images": count, "nfe": rows, "cpu_seconds_per_image": round(spent, 4)}


def _measured(model: Any, images: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
    with torch.no_grad():
        logits = model.logits(extracted_features(model, images))
    asked = torch.tensor([prompt.concept for prompt in prompts(len(images))])
    avoided = backgrounds().index(AVOIDED)
    return {
        "sky_blue": round(float((logits.background.argmax(1) == avoided).float().mean()), 4),
        "concept": round(float((logits.concept.argmax(1) == asked).float().mean()), 4),
        "ssim": round(float(ssim(images, plain).mean()), 4),
        "saturation": round(saturation(images), 4),
        "clipped": round(clipped_share(images), 4),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table in docs/guidance.md: means of the seeds."""
    names = {"sky_blue": 1, "concept": 3, "ssim": 3, "saturation": 3, "clipped": 1}
    lines = ["| s, τ, α | NFE | sky blue | concept | SSIM | saturation | clipped | CPU s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == name]
        means = {k: sum(float(row[k]) for row in own) / len(own) for k in own[0] if k != "rule"}
        cells = [name, f"{means['nfe']:g}"]
        for key, digits in names.items():
            share = key in ("sky_blue", "clipped")
            cells.append(f"{100 * means[key]:.1f} %" if share else f"{means[key]:.{digits}f}")
        cells.append(f"{means['cpu_seconds_per_image']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
