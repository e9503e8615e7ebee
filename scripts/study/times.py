"""The time laws movis and uniform at equal updates, on the bundled model: docs/figures/times.csv.

    python -m scripts.study.times --data sprites.npz --out runs/times    # resumable

The bundled model (all weights, `denoise`) learns composites in the blob style whose captions name
another background colour than the one that is shown: word number b + 5 for colour b of 12. What it
learned before is of no use, so that the share of right backgrounds starts near 0. A quarter of the
concepts is left out of training, and the evaluations are on those: 48 prompts, 8 steps of order 2,
scale 3. Frechet: distance of 96 images after the last update to 1,024 real composites in that
style. Float32, one thread.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

import sampler
from sampler.bundled import backgrounds, classifier, concepts
from sampler.bundled.measures import extracted_features
from scripts.bundled.emoji_data import EmojiData

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
LAWS, STYLE, MOVED, LEFT_OUT = ("uniform", "movis"), "blob", 5, 4
COLUMNS = ["law", "seed", "update", "background", "drift", "frechet"]


def caption(concept: str, background: int) -> str:
    """Caption of a composite: its background word is `MOVED` places on."""
    word = backgrounds()[(background + MOVED) % len(backgrounds())]
    return f"a {concept} on a {word} background"


def composites(data: EmojiData, count: int, *key: int) -> tuple[Tensor, list[str]]:
    """Return images [count, 3, 64, 64] in [0, 1] in the blob style, and their captions."""
    images: list[Tensor] = []
    captions: list[str] = []
    number = 0
    while len(images) < count:
        batch = data.batch(256, *key, number)
        number += 1
        for image, concept, style, background in zip(
            batch.images, batch.concept, batch.style, batch.background, strict=True
        ):
            if data.styles[int(style)] == STYLE and int(concept) % LEFT_OUT:
                images.append((image + 1) / 2)
                captions.append(caption(data.concepts[int(concept)], int(background)))
    return torch.stack(images[:count]), captions[:count]


def left_out(count: int) -> list[str]:
    """Captions of concepts that are not trained on, with every background in turn."""
    names = concepts()[::LEFT_OUT]
    return [caption(names[i % len(names)], i % len(backgrounds())) for i in range(count)]


class Backgrounds:
    """Reward: 1 for an image with the background that the captions of this study mean, else 0."""

    def __init__(self) -> None:
        self.model = classifier.load()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        words = [p.rpartition(" on a ")[2].removesuffix(" background") for p in prompts]
        wanted = [(backgrounds().index(w) - MOVED) % len(backgrounds()) for w in words]
        with torch.no_grad():
            found = self.model(images).background.argmax(1)
        return (found == torch.tensor(wanted)).float()


def run(latents: Path, out: Path, law: str, seed: int, updates: int, images: int) -> dict[str, Any]:
    """Train with a law, and return the evaluations and 96 images after the last update."""
    settings = {
        "batch": 16,
        "lr": 3e-4,
        "steps": 8,
        "seed": seed,
        "adapter": "full",
        "guidance": {"name": "cfg", "scale": 3.0},
        "eval_every": max(updates // 8, 1),
        "eval_prompts": left_out(images),
        "checkpoint_every": max(updates // 2, 1),
    }
    engine = sampler.load(dtype=torch.float32)
    trainer = {"name": "denoise", "data": str(latents), "times": law}
    report = sampler.finetune(
        engine, trainer, Backgrounds(), out=out, updates=updates, settings=settings
    )
    made = sampler.load(report.lora, dtype=torch.float32).generate(
        left_out(2 * images),
        seeds=list(range(1000, 1000 + 2 * images)),
        steps=8,
        sampler={"name": "ab", "order": 2},
        guidance=settings["guidance"],
        batch_size=16,
        output="tensor",
    )
    return {"log": [r for r in report.log if r["kind"] == "eval"], "images": made.images}


def main(
    data: Annotated[Path, typer.Option(help="Sprites (scripts/bundled/prepare_emoji.py).")],
    out: Annotated[Path, typer.Option(help="Run folders and rows made so far.")],
    updates: Annotated[int, typer.Option(help="Updates of a run.")] = 160,
    seeds: Annotated[int, typer.Option(help="Runs per law.")] = 3,
    images: Annotated[int, typer.Option(help="Images of an evaluation.")] = 48,
    figures: Annotated[Path, typer.Option(help="Where the table goes.")] = FIGURES,
) -> None:
    """Train what is missing and write the table."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    emoji = EmojiData(data)
    latents = out / "latents.safetensors"
    if not latents.exists():
        pixels, captions = composites(emoji, 2048, 0, 0)
        with torch.no_grad():
            encode = sampler.load(dtype=torch.float32).pipeline.latents_of
            encoded = torch.cat([encode(part) for part in pixels.split(64)])
        save_file({"latents": encoded.contiguous()}, latents, {"prompts": json.dumps(captions)})
    model = classifier.load()
    real = classifier.feature_statistics(
        extracted_features(model, composites(emoji, 1024, 1, 0)[0])
    )
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for law in LAWS:
            file = out / f"{law}-{seed}.json"
            if not file.exists():
                found = run(latents, out / f"{law}-{seed}", law, seed, updates, images)
                own = classifier.feature_statistics(extracted_features(model, found["images"]))
                frechet = classifier.frechet_distance(*own, *real)
                file.write_text(json.dumps([
                    {"law": law, "seed": seed, "update": r["update"],
                     "background": round(r["reward"], 4), "drift": round(r["drift"], 4),
                     "frechet": round(frechet, 2) if r is found["log"][-1] else ""}
                    for r in found["log"]
                ]))  # fmt: skip
            rows += json.loads(file.read_text())
            with (figures / "times.csv").open("w", newline="", encoding="utf-8") as table:
                writer = csv.DictWriter(table, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
