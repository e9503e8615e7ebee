"""Distil the bundled model into a one-step student with f-distill, and pack it.

    python -m scripts.bundled.distill_student train --data sprites.npz --out runs/student \\
        --minutes 15
    python -m scripts.bundled.distill_student pack  --out runs/student

`train` stops after so many minutes and goes on at the next call; a run that was stopped or killed
ends with the weights of one that was not. Real images are composites of the sprites, as the model
was trained on. The student begins as the bundled few-step student at the scale that is baked in,
as the authors' largest ones begin as another student; `--begin teacher` and `--warmup 1200` do
without it. `pack` writes the folder of `sampler.load("bundled-student")`. What students are worth
is measured by `scripts/study/students.py`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

import sampler
from sampler.bundled import prompts
from sampler.models.difference import packed, unpacked
from sampler.models.few_step import STUDENT as LCM
from sampler.models.student import read_network
from sampler.models.student_files import MANIFEST, WEIGHTS, read_manifest, student_folder
from sampler.pipelines.stable_diffusion import scale_embedding
from scripts.bundled.emoji_data import EmojiData
from scripts.bundled.networks import plain_attention

STEPS, SCALE = 10, 3.0  # of the teacher's images; the scale that is baked in
SEED = 0

app = typer.Typer(add_completion=False)
Out = Annotated[Path, typer.Option(help="Run folder.")]


class _Paused(Exception):
    """Raised when the time budget is spent."""


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="sprites.npz; see scripts/bundled/prepare_emoji.py.")],
    out: Out = Path("runs/student"),
    begin: Annotated[str, typer.Option(help='"lcm", "teacher", or a network\'s folder.')] = "lcm",
    updates: int = 300,
    warmup: int = 0,
    pairs: int = 2048,
    images: int = 8192,
    divergence: str = "js",
    gan_weight: float = 5e-3,
    every: int = 3,
    lr: float = 3e-4,
    lr_end: Annotated[float, typer.Option(help="What is left of it at the last update.")] = 0.05,
    batch: int = 16,
    precision: Annotated[str, typer.Option(help='"bf16" where the processor has it.')] = "no",
    seed: int = SEED,
    minutes: float = 60.0,
) -> None:
    """Train for some minutes, resuming an interrupted run."""
    began = time.monotonic()
    engine = sampler.load()
    plain_attention(engine.pipeline.network)
    captions = composites(engine, data, images, out / "composites.safetensors")
    first = {"teacher": None, "lcm": str(out / "begin")}.get(begin, begin)
    if begin == "lcm" and not (out / "begin").is_dir():
        few_step_network(engine.pipeline.network).save_pretrained(out / "begin")

    def told(record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)
        if time.monotonic() - began > 60 * minutes:
            raise _Paused

    trainer = {
        "name": "f_distill",
        "divergence": divergence,
        "gan_weight": gan_weight,
        "data": str(out / "composites.safetensors"),
        "init": first,
        "samples": pairs,
        "warmup": warmup,
        "student_every": every,
        "ema": 0.998,
        "memory": 0.95,  # of 16 rows one or two fall into a bin: its mean needs a memory
    }
    settings = {
        "batch": batch,
        "steps": STEPS,
        "sampler": {"name": "ab", "order": 2},
        "guidance": {"name": "cfg", "scale": SCALE},
        "lr": lr,
        "lr_end": lr_end,
        "betas": [0.9, 0.99],
        "seed": seed,
        "mixed_precision": precision,
        "checkpoint_every": 100,
        "eval_every": 300,
        "eval_prompts": [p.text for p in prompts(16)],
    }
    try:
        options = {"settings": settings, "progress": told}
        sampler.finetune(engine, trainer, None, captions, out, updates, **options)
    except _Paused:
        print("paused", flush=True)


def few_step_network(teacher: Any) -> Any:
    """The bundled few-step student at one scale, as a network of the teacher's class.

    Its layer W_s takes in the scale's embedding e before the first layer of the time embedding:
    W(t + W_s·e) + b = W·t + (b + W·W_s·e), so that a fixed scale goes into the bias, exactly.
    """
    weights = unpacked(load_file(LCM / "student.safetensors"), teacher.state_dict())
    told = weights.pop("time_embedding.cond_proj.weight")
    shift = told @ scale_embedding(torch.tensor([SCALE]), told.shape[1])[0]
    layer = "time_embedding.linear_1"
    weights[f"{layer}.bias"] += weights[f"{layer}.weight"] @ shift
    student = type(teacher).from_config(teacher.config)
    student.load_state_dict(weights)
    return student


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
                latents.append(engine.pipeline.latents_of(batch.images[chosen] / 2 + 0.5))
            captions += [batch.captions[i] for i in chosen]
            index += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"prompts": json.dumps(captions[:count])}
        save_file({"latents": torch.cat(latents)[:count].contiguous()}, path, metadata)
        kept.write_text(json.dumps(captions[:count]), encoding="utf-8")
    return sorted(set(json.loads(kept.read_text(encoding="utf-8"))))


@app.command()
def pack(
    out: Out = Path("runs/student"),
    to: Annotated[Path | None, typer.Option(help="Folder to write; OUT/packed by default.")] = None,
) -> None:
    """Store a finished run's student as a difference to its teacher."""
    source, folder = student_folder(out), to or out / "packed"
    teacher = sampler.load().pipeline.network
    student = read_network(teacher, source / "unet")
    folder.mkdir(parents=True, exist_ok=True)
    stored = packed(student.state_dict(), teacher.state_dict())
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    manifest: dict[str, Any] = read_manifest(source) | {"form": "difference"}
    for key in ("data", "init"):  # places on the machine that trained it
        manifest["trainer"].pop(key, None)
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
