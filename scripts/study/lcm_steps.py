"""Measure why the few-step student of the bundled model gets worse with more steps.

    python -m scripts.study.lcm_steps --out runs/lcm_steps

Every setting is a run folder of its own with the seeds of `sampler eval`, judged by the classifier
that has seen no training, and compared in pairs with one step at the same scale. Three changes are
tried: the embedded guidance scale; no fresh noise between the steps (`ddim`); and images to start
from, noised to the last steps of eight, which are the teacher's (20 steps of `ddim`) or the
student's own of one step. Writes docs/figures/lcm_steps.csv row by row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sampler
from sampler.bundled import BUNDLED_LCM, prompts
from sampler.core.images import read
from sampler.evaluation.compare import Row
from sampler.evaluation.lines import seed_of

FIGURES = Path(__file__).parents[2] / "docs" / "figures" / "lcm_steps.csv"
# Sampler, scale, steps, start: "noise", or images that are noised to the last `steps` of 8.
SETTINGS = [
    ("consistency", scale, steps, "noise") for scale in (3.0, 2.0, 1.0) for steps in (1, 2, 4, 8)
]
SETTINGS += [("ddim", 3.0, steps, "noise") for steps in (2, 4, 8)]
SETTINGS += [("consistency", 3.0, n, start) for start in ("teacher", "own") for n in (0, 1, 2, 4)]
LEVELS = 8  # of the student's training
SCORES = ("judge.concept", "judge.background", "saturation", "clipped", "sharpness")


def columns(name: str, row: Row) -> dict[str, Any]:
    """Mean, interval and paired difference of a score as cells."""
    low, high = row.interval or (None, None)
    cells: dict[str, Any] = {name: row.mean, f"{name}_low": low, f"{name}_high": high}
    if row.difference is not None:
        low, high = row.difference.interval or (None, None)
        gap = {"change": row.difference.mean, "change_low": low, "change_high": high}
        cells |= {f"{name}_{key}": value for key, value in gap.items()}
    return {key: value if value is None else round(value, 5) for key, value in cells.items()}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/lcm_steps"),
    figures: Annotated[Path, typer.Option(help="CSV to write.")] = FIGURES,
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 2,
) -> None:
    """Generate, evaluate and compare all settings."""
    torch.set_num_threads(1)
    engine, rows = sampler.load(BUNDLED_LCM, dtype="float32"), []
    texts = [prompt.text for prompt in prompts(count) for _ in range(repeats)]
    seeds = [seed_of(text, k % repeats) for k, text in enumerate(texts)]
    for method, scale, steps, start in SETTINGS:
        folder = out / f"{method}-{scale:g}-{steps}-{start}"
        images = None if start == "noise" else starts(out, engine, start, texts, seeds)
        embedded: Any = {"name": "embedded", "scale": scale}
        made = engine.generate(
            texts, seeds=seeds, steps=steps if images is None else LEVELS, sampler=method,
            batch_size=32, guidance=embedded, image=images,
            strength=None if images is None else steps / LEVELS,
        )  # fmt: skip
        save(folder, made.images, texts, seeds)
        found = sampler.evaluate(folder, "judge", against=out / f"consistency-{scale:g}-1-noise")
        row: dict[str, Any] = {"start": start, "sampler": method, "scale": scale, "steps": steps}
        row |= {"prompts": count, "images": len(seeds)}
        for name in SCORES:
            row |= columns(name, found[name])
        rows.append(row)
        figures.parent.mkdir(parents=True, exist_ok=True)
        with figures.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [*row])
            writer.writeheader()
            writer.writerows(rows)
        print(start, method, scale, steps, row["judge.concept"], flush=True)


def save(folder: Path, images: Sequence[Any], texts: Sequence[str], seeds: Sequence[int]) -> None:
    """Write images with their prompts and seeds as a folder that `sampler eval` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k, (image, text, seed) in enumerate(zip(images, texts, seeds, strict=True)):
        image.save(folder / f"{k:04d}.png")
        lines.append(json.dumps({"file_name": f"{k:04d}.png", "prompt": text, "seed": seed}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def starts(
    out: Path, engine: sampler.Engine, start: str, texts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """Images [N, 3, 64, 64] of the teacher, or of one step of the student, made once."""
    folder = out / f"start-{start}"
    if not folder.exists():
        teacher = {"sampler": "ddim", "guidance": {"name": "cfg", "scale": 3.0}}
        own: Any = {"sampler": "consistency", "guidance": {"name": "embedded", "scale": 3.0}}
        settings: Any = own if start == "own" else teacher
        model = engine if start == "own" else sampler.load(dtype="float32")
        steps = 1 if start == "own" else 20
        made = model.generate(texts, seeds=seeds, steps=steps, batch_size=32, **settings)
        save(folder, made.images, texts, seeds)
    return torch.cat([read(path) for path in sorted(folder.glob("*.png"))])


if __name__ == "__main__":
    typer.run(main)
