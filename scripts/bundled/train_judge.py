"""Train the judge: the second classifier of the bundled model's world (sampler/bundled/judge.py).

    python -m scripts.bundled.train_judge --data sprites.npz --out runs/judge

Another architecture and seed than the classifier's, on the same composites. A killed call,
repeated, continues from its last checkpoint with the same losses, bit for bit on a CPU. It ends
with OUT/judge (config.json, fp16 model.safetensors) and OUT/report.json, the accuracies on fresh
composites.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from sampler.bundled import judge
from scripts.bundled.classifier_task import ClassifierTask, accuracy
from scripts.bundled.emoji_data import EmojiData
from scripts.bundled.loop import Plan, train


def main(
    data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Sprite file (npz).")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/judge"),
    images: Annotated[int, typer.Option(min=1, help="Budget in images seen.")] = 192_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 3e-3,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Steps between states.")] = 250,
    measured: Annotated[int, typer.Option(min=1, help="Fresh images of the report.")] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 11,
) -> None:
    """Train, resuming an interrupted run; write the folder and the report."""
    torch.set_num_threads(1)
    sprites = EmojiData(data)
    task = ClassifierTask(sprites, batch_size, seed, judge.Judge, autocast=False)
    plan = Plan(lr, images, None, batch_size, weight_decay=0.05, checkpoint_steps=checkpoint_steps)
    trained: Any = train(task, plan, out)["classifier"]
    config = {
        "widths": judge.WIDTHS,
        "depths": judge.DEPTHS,
        "concepts": sprites.concepts,
        "styles": sprites.styles,
        "backgrounds": sprites.backgrounds,
        "trained": {"images": images, "batch_size": batch_size, "lr": lr, "seed": seed},
    }
    folder = out / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    state = {name: value.half().contiguous() for name, value in trained.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    # The report is that of the rounded weights, which are shipped.
    figures: Any = accuracy(judge.load(folder), sprites, measured, seed)
    (out / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
