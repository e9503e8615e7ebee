"""Distil the bundled model into a one-step student with f-distill, and measure it.

    python scripts/distill_student.py train  --data sprites.npz --out runs/student --minutes 15
    python scripts/distill_student.py report --student runs/student --out runs/student/report

`train` stops after so many minutes and goes on at the next call; a run that was stopped or killed
ends with the weights of one that was not. Real images are composites of the sprites, as the model
was trained on; the warm-up learns images of the teacher from their noise. `report` measures the
student's images against those of the teacher at 1, 2, 4 and 20 steps: agreement with the prompt,
Fréchet distance, coverage of real images' neighbourhoods in classifier features, seconds an image.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bundled_classifier_task import composite_features
from bundled_loop import save_pictures
from bundled_networks import plain_attention
from emoji_data import EmojiData
from safetensors.torch import save_file
from torch import Tensor

import sampler
from sampler.bundled import prompts
from sampler.bundled.classifier import load, reference_statistics
from sampler.bundled.measures import extracted_features, measure
from sampler.images import encode

STEPS, SCALE = 10, 3.0  # of the teacher's images; the scale that is baked in
SEED = 0

app = typer.Typer(add_completion=False)
Out = Annotated[Path, typer.Option(help="Run folder.")]


class _Paused(Exception):
    """The minutes are over."""


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="sprites.npz; see scripts/prepare_emoji.py.")],
    out: Out = Path("runs/student"),
    updates: int = 5400,
    warmup: int = 1200,
    pairs: int = 2048,
    images: int = 8192,
    divergence: str = "js",
    gan_weight: float = 5e-3,
    every: int = 3,
    lr: float = 3e-4,
    seed: int = SEED,
    minutes: float = 15.0,
) -> None:
    """Train, or go on for some minutes."""
    began = time.monotonic()
    engine = sampler.load()
    plain_attention(engine.pipeline.network)
    captions = composites(engine, data, images, out / "composites.safetensors")

    def told(record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)
        if time.monotonic() - began > 60 * minutes:
            raise _Paused

    trainer = {
        "name": "f_distill",
        "divergence": divergence,
        "gan_weight": gan_weight,
        "data": str(out / "composites.safetensors"),
        "samples": pairs,
        "warmup": warmup,
        "student_every": every,
        "ema": 0.998,
        "memory": 0.95,  # of 16 rows one or two fall into a bin: its mean needs a memory
    }
    settings = {
        "batch": 16,
        "steps": STEPS,
        "sampler": {"name": "ab", "order": 2},
        "guidance": {"name": "cfg", "scale": SCALE},
        "lr": lr,
        "betas": [0.9, 0.99],
        "seed": seed,
        "mixed_precision": "bf16",
        "checkpoint_every": 100,
        "eval_every": 300,
        "eval_prompts": [p.text for p in prompts(16)],
    }
    try:
        options = {"settings": settings, "progress": told}
        sampler.finetune(engine, trainer, None, captions, out, updates, **options)
    except _Paused:
        print("paused", flush=True)


@app.command()
def report(
    student: Annotated[Path, typer.Option(help="Its folder, or the run's.")],
    data: Annotated[Path, typer.Option(help="sprites.npz, for real images.")],
    out: Out = Path("runs/student/report"),
    count: Annotated[int, typer.Option(help="Images of each.")] = 512,
) -> None:
    """Measure a student and its teacher on the evaluation prompts."""
    engine = sampler.load(student=student)
    model, wanted = load(), prompts(count)
    real = composite_features(model, EmojiData(data), count, SEED + 1)
    cfg = {"guidance": {"name": "cfg", "scale": SCALE}, "sampler": "ddim"}
    runs = {"student": {"steps": engine.pipeline.student["steps"]}}
    runs |= {f"teacher, {n} steps": {"steps": n, **cfg} for n in (1, 2, 4, 20)}
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    for name, options in runs.items():
        made = engine.generate(
            [p.text for p in wanted], seeds=0, batch_size=16, output="tensor", **options
        )
        found = measure(model, made.images, wanted, reference_statistics())
        found |= neighbours(real, extracted_features(model, made.images))
        rows.append({"of": name, **found, "seconds": made.seconds / count})
        save_pictures(made.images[:64], out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
        print(json.dumps(rows[-1]), flush=True)
    (out / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def neighbours(real: Tensor, made: Tensor, k: int = 5) -> dict[str, float]:
    """Recall and coverage of features [N, D].

    recall: the share of real ones within the k-th neighbour distance of a made one (Kynkäänniemi et
    al., 2019, arXiv:1904.06991); coverage: the share of real ones with a made one within their own
    k-th neighbour distance (Naeem et al., 2020, arXiv:2002.09797).
    """
    between = torch.cdist(real, made)
    radius_real, radius_made = (torch.cdist(v, v).sort(1).values[:, k] for v in (real, made))
    return {
        "recall": float((between <= radius_made).any(1).float().mean()),
        "coverage": float((between <= radius_real[:, None]).any(1).float().mean()),
    }


def composites(engine: Any, data: Path, count: int, path: Path) -> list[str]:
    """Writes latents of composites with their captions, once; returns the different captions."""
    kept = path.with_suffix(".json")
    if not kept.is_file():
        source, latents, captions = EmojiData(data), [], []
        index = 0
        while len(captions) < count:
            batch = source.batch(64, SEED + 7_000_003, index)
            chosen = [i for i, text in enumerate(batch.captions) if text]
            with torch.no_grad():
                latents.append(encode(engine.pipeline, batch.images[chosen] / 2 + 0.5))
            captions += [batch.captions[i] for i in chosen]
            index += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"prompts": json.dumps(captions[:count])}
        save_file({"latents": torch.cat(latents)[:count].contiguous()}, path, metadata)
        kept.write_text(json.dumps(captions[:count]), encoding="utf-8")
    return sorted(set(json.loads(kept.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
