"""Trials of `cfg`'s options, `cfg_pp`, `cads` and `forecast` on easy and hard prompts.

    python -m scripts.study.trials --out runs/trials    # resumable; docs/figures/trials.csv

The bundled model, 20 DDIM steps, three seeds. Easy prompts are those that the model was trained
on. Hard ones, in turn: two styles at once, two concepts at once (right if the image is taken for
either of them), and two concepts with a style each, as long as the text encoder takes. Accuracy:
concept and background as asked. SSIM is to `cfg` at scale 3 with the same prompt and seed. Float32,
one thread, batches of 8.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sampler
from sampler.bundled import backgrounds, classifier, concepts, prompts, styles
from sampler.bundled.measures import clipped_share, extracted_features, saturation
from sampler.metrics import ssim

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS = (0, 1, 2)
CFG: dict[str, Any] = {"name": "cfg", "scale": 3.0}
RULES: dict[str, dict[str, Any]] = {
    "cfg": CFG,
    "forecast 0.016": {"name": "forecast", "rule": CFG},
    "forecast 0.024": {"name": "forecast", "rule": CFG, "tolerance": 0.024},
    "forecast, window": {"name": "forecast", "rule": CFG, "when": "window"},
    "cfg, tangential": {**CFG, "tangential": True},
    "cfg, damp 8": {**CFG, "damp": 8.0},
    "cfg, norm_limit 1": {**CFG, "norm_limit": 1.0},
    "cfg, scales falling": {"name": "cfg", "scales": [5 - 0.2 * i for i in range(20)]},
    "cfg_pp 0.4": {"name": "cfg_pp", "strength": 0.4},
    "cfg_pp 0.8": {"name": "cfg_pp", "strength": 0.8},
    "cads": {"name": "cads", "rule": CFG},
}


@dataclass(frozen=True)
class Asked:
    """A prompt, the concepts that are right, and the background."""

    text: str
    concepts: tuple[int, ...]
    background: int


def easy(count: int, start: int) -> list[Asked]:
    """The prompts of the other studies."""
    return [Asked(p.text, (p.concept,), p.background) for p in prompts(count, start)]


def hard(count: int, start: int) -> list[Asked]:
    """Two styles, two concepts, and two concepts with styles, in turn."""
    names, looks, found = concepts(), styles(), list[Asked]()
    for i, p in enumerate(prompts(count, start), start):
        look, other = looks[i % len(looks)], looks[(i + 1) % len(looks)]
        second = (p.concept + 37) % len(names)
        ground = f"on a {backgrounds()[p.background]} background"
        texts = (
            f"a {look} {other} {names[p.concept]} {ground}",
            f"a {names[p.concept]} and a {names[second]} {ground}",
            f"a {look} {names[p.concept]} and a {other} {names[second]} {ground}",
        )
        right = (p.concept, second) if i % 3 else (p.concept,)
        found.append(Asked(texts[i % 3], right, p.background))
    return found


SETS = {"easy": easy, "hard": hard}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the images made so far.")],
    count: Annotated[int, typer.Option(help="Images per rule, set and seed.")] = 24,
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
) -> None:
    """Make the images that are missing, and write the CSV."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    engine, model, rows = sampler.load(), classifier.load(), list[dict[str, Any]]()
    for seed in SEEDS:
        for label, texts in SETS.items():
            asked = texts(count, seed * count)
            for name, rule in RULES.items():
                file = out / f"{label}_{seed}_{list(RULES).index(name)}.pt"
                if not file.exists():
                    torch.save(_made(engine, rule, seed, asked), file)
                made = torch.load(file)
                plain = torch.load(out / f"{label}_{seed}_0.pt")["images"]
                row = {"rule": name, "prompts": label, "seed": seed, "images": count}
                rows.append({**row, **_measured(model, made, plain, asked)})
                print(json.dumps(rows[-1]), flush=True)
    with (docs / "figures" / "trials.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _made(engine: Any, rule: Any, seed: int, asked: Sequence[Asked]) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": 20, "sampler": "ddim", "output": "tensor", "batch_size": 8}
    made = engine.generate([a.text for a in asked], seeds=1000 * seed, guidance=rule, **options)
    return {"images": (made.images * 255).round().to(torch.uint8), "nfe": sum(made.nfe)}


def _measured(
    model: Any, made: dict[str, Any], plain: torch.Tensor, asked: Sequence[Asked]
) -> dict[str, float]:
    images, plain = made["images"].float() / 255, plain.float() / 255
    with torch.no_grad():
        logits = model.logits(extracted_features(model, images))
    found = zip(
        logits.concept.argmax(1).tolist(), logits.background.argmax(1).tolist(), asked, strict=True
    )
    right = [c in a.concepts and b == a.background for c, b, a in found]
    same = ssim(images, plain)
    return {
        "nfe": round(made["nfe"] / len(asked), 2),
        "accuracy": round(sum(right) / len(right), 4),
        "ssim": round(float(same.mean()), 4),
        "worst_ssim": round(float(same.min()), 4),
        "saturation": round(saturation(images), 4),
        "clipped": round(clipped_share(images), 4),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table in docs/guidance.md: means of the seeds, least SSIM."""
    head = ["rule", "prompts", "NFE", "accuracy", "SSIM", "worst image", "saturation", "clipped"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, label in dict.fromkeys((row["rule"], row["prompts"]) for row in rows):
        own = [row for row in rows if (row["rule"], row["prompts"]) == (name, label)]

        def mean(key: str, own: list[dict[str, Any]] = own) -> float:
            return sum(float(row[key]) for row in own) / len(own)

        worst = min(float(row["worst_ssim"]) for row in own)
        cells = [name, label, f"{mean('nfe'):.1f}", f"{mean('accuracy'):.3f}"]
        cells += [f"{mean('ssim'):.4f}", f"{worst:.3f}", f"{mean('saturation'):.3f}"]
        cells.append(f"{100 * mean('clipped'):.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
