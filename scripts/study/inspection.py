"""Study of the inspections on the bundled model: features by block and noise, and word maps.

    python -m scripts.study.inspection --sprites DATA/sprites.npz

Features: concept (32 classes) and style (4) of real composites, read by ridge probes as in
`sampler inspect features`; 448 images fit, 192 test, in three draws. Word maps: the concept's word
in 64 generated images against the foreground by colour distance, beside a centred blob; intervals
are 1.96 standard errors over the images. Realism: 256 composites a side against images of the
bundled model (20 steps) and of its one-step student, with the two controls. Loss: 512 composites.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import sampler
from sampler.bundled import concepts, prompts
from sampler.engine.inspection import realism
from sampler.engine.inspection.attention import region
from sampler.engine.inspection.classify import block_table
from sampler.engine.inspection.loss import loss
from sampler.evaluation.features import Extractor
from scripts.bundled.emoji_data import EmojiData

SHARES = (0.05, 0.15, 0.3, 0.45, 0.6)
DRAWS, IMAGES, CLASSES = 3, 640, 32
COUNT, STEPS = 64, 20
SCORES: dict[str, Any] = {"attention": None, "guidance": "guidance", "classifier": "classifier"}


def main(
    sprites: Annotated[Path, typer.Option(help="sprites.npz of the training data.")],
    docs: Annotated[Path, typer.Option(help="The folder docs/.")] = Path("docs"),
    only: Annotated[
        list[str] | None, typer.Option(help="features, attention, loss, realism; default: all.")
    ] = None,
) -> None:
    """Write inspect_features.csv, inspect_attention.csv, inspect_loss.csv, inspect_realism.csv."""
    torch.set_num_threads(1)
    engine, data = sampler.load(), EmojiData(sprites)
    parts = {
        "features": lambda: [row for draw in range(DRAWS) for row in features(engine, data, draw)],
        "attention": lambda: word_maps(engine),
        "loss": lambda: losses(engine, data),
        "realism": lambda: realism_rows(engine, data),
    }
    for name in only or parts:
        _write(docs / "figures" / f"inspect_{name}.csv", parts[name]())


def features(engine: sampler.Engine, data: EmojiData, draw: int) -> list[dict[str, Any]]:
    """Rows of `block_table` on one draw of composites."""
    images, names = composites(data, draw)
    blocks = engine.pipeline.blocks[1:]
    rows = block_table(engine, images, names, SHARES, blocks)
    for row in rows:
        print(draw, row, flush=True)
    return [{"draw": draw, **row} for row in rows]


def composites(data: EmojiData, draw: int) -> tuple[Tensor, dict[str, list[str]]]:
    """Images [N, 3, 64, 64] in [0, 1] of the first concepts, and their labels."""
    images: list[Tensor] = []
    labels: dict[str, list[str]] = {"concept": [], "style": []}
    number = 0
    while len(labels["concept"]) < IMAGES:
        batch = data.batch(256, 7, draw, number)
        keep = batch.concept < CLASSES
        images.append(batch.images[keep] / 2 + 0.5)
        labels["concept"] += [data.concepts[k] for k in batch.concept[keep]]
        labels["style"] += [data.styles[k] for k in batch.style[keep]]
        number += 1
    return torch.cat(images)[:IMAGES], {k: v[:IMAGES] for k, v in labels.items()}


def losses(engine: sampler.Engine, data: EmojiData) -> list[dict[str, Any]]:
    """Rows of `loss` on composites with their captions."""
    batch = data.batch(512, 7, 100)
    rows = loss(engine, batch.images / 2 + 0.5, batch.captions)
    return [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def realism_rows(engine: sampler.Engine, data: EmojiData) -> list[dict[str, Any]]:
    """Rows of `realism` for the bundled model and its one-step student."""
    real = data.batch(512, 7, 200).images / 2 + 0.5
    captions = data.batch(256, 7, 201).captions
    found: list[dict[str, Any]] = []
    for name, steps in (("bundled", 20), ("bundled-student", 1)):
        made = sampler.load(name).generate(
            captions, seeds=0, steps=steps, batch_size=32, output="tensor"
        )
        for kind, extract in (("classifier", Extractor()), ("spectrum", realism.log_spectrum)):
            shares, _ = realism.realism(engine, real, made.images, extract)
            found += [{"model": name, **row} for row in realism.table_of(shares, kind)]
            print(*found[-3:], sep="\n", flush=True)
    return found


def word_maps(engine: sampler.Engine) -> list[dict[str, Any]]:
    """A row per kind of map: IoU of its part above the mean, and AUC, on the foreground."""
    listed = prompts(COUNT)
    texts, words = [p.text for p in listed], [[concepts()[p.concept]] for p in listed]
    rows: list[dict[str, Any]] = []
    truth: Tensor | None = None
    for name, score in SCORES.items():
        found = engine.attention(texts, words, score=score, seeds=100, steps=STEPS)
        if truth is None:
            truth = foreground(found.images)
        maps = torch.stack([own[word[0]] for own, word in zip(found.maps, words, strict=True)])
        rows.append(_measured(name, maps, truth))
        print(rows[-1], flush=True)
    assert truth is not None
    axis = torch.linspace(-1, 1, truth.shape[-1])
    blob = (-(axis[:, None].square() + axis.square())).exp().expand(truth.shape)
    return [*rows, _measured("centred blob", blob, truth)]


def foreground(images: Tensor, threshold: float = 0.25) -> Tensor:
    """Pixels [B, 16, 16] farther than `threshold` from the median colour of the border."""
    border = torch.cat([images[..., :2, :].flatten(2), images[..., -2:, :].flatten(2)], 2)
    gap = (images - border.median(2).values[..., None, None]).norm(dim=1)
    return F.adaptive_avg_pool2d((gap > threshold).float()[:, None], 16)[:, 0] > 0.5


def auc(values: Tensor, truth: Tensor) -> float:
    """Probability that a foreground value is above a background one; ties count half."""
    inside, outside = values[truth], values[~truth]
    above = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    return float(above.mean())


def _measured(name: str, maps: Tensor, truth: Tensor) -> dict[str, Any]:
    kept = [k for k, own in enumerate(truth) if 0 < int(own.sum()) < own.numel()]
    chosen = region(maps)
    overlaps = [float((chosen[k] & truth[k]).sum() / (chosen[k] | truth[k]).sum()) for k in kept]
    areas = [auc(maps[k].contiguous(), truth[k]) for k in kept]
    area = float(truth[kept].float().mean())
    return {
        "map": name, "images": len(kept), "foreground": round(area, 4),
        **_mean("iou", overlaps), **_mean("auc", areas),
    }  # fmt: skip


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(found.std()) / math.sqrt(len(found))
    mean = float(found.mean())
    return {
        name: round(mean, 4), f"{name}_low": round(mean - half, 4),
        f"{name}_high": round(mean + half, 4),
    }  # fmt: skip


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    typer.run(main)
