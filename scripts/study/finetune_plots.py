"""Figures of `study/finetune.py`, from its tables and images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

COLOURS = {"alignprop": "C0", "ddpo": "C1", "rlcm": "C2"}


def curves(rows: list[dict[str, Any]], mix: list[dict[str, Any]], path: Path) -> None:
    """Per reward: against images, against CPU seconds (a line per seed), and the mix sweep."""
    rewards = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = plt.subplots(
        3, len(rewards), figsize=(4 * len(rewards), 9), squeeze=False, layout="constrained"
    )
    for column, reward in enumerate(rewards):
        for axis, key in ((axes[0][column], "images"), (axes[1][column], "cpu_seconds")):
            for trainer, colour in COLOURS.items():
                mine = [r for r in rows if (r["reward"], r["trainer"]) == (reward, trainer)]
                for seed in sorted({r["seed"] for r in mine}):
                    line = [r for r in mine if r["seed"] == seed]
                    xs, ys = ([float(r[k]) for r in line] for k in (key, "value"))
                    axis.plot(xs, ys, colour, alpha=0.7, label=trainer if seed == "0" else None)
            axis.set_xlabel("images made" if key == "images" else "CPU seconds of updates")
        axis = axes[2][column]
        for trainer, colour in COLOURS.items():
            line = [r for r in mix if (r["reward"], r["trainer"]) == (reward, trainer)]
            xs, ys = ([float(r[k]) for r in line] for k in ("value", "frechet"))
            axis.plot(xs, ys, f"{colour}o-", label=trainer)
        axis.set_xlabel("reward at adapter weights 0, 1/4, 1/2, 3/4, 1")
        axes[0][column].set_title(reward)
    for row, label in enumerate(("reward", "reward", "Fréchet distance")):
        axes[row][0].set_ylabel(label)
    axes[0][0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def strips(out: Path, rewards: Sequence[str], path: Path) -> None:
    """Eight images per row: each model before, and after each of its trainings; seed 0."""
    named: list[tuple[str, Path]] = []
    for trainer in COLOURS:
        for reward in rewards:
            for weight, when in ((0, "before"), (1, reward)):
                file = out / f"{reward}-{trainer}-{weight}.pt"
                label = f"{trainer}\n{when}"
                if file.is_file() and label not in [name for name, _ in named]:
                    named.append((label, file))
    figure, axes = plt.subplots(
        len(named), 1, figsize=(8, 1.05 * len(named)), squeeze=False, layout="constrained"
    )
    for axis, (label, file) in zip(axes[:, 0], named, strict=True):
        images = torch.load(file, weights_only=True).float()
        axis.imshow(images.permute(2, 0, 3, 1).flatten(1, 2).clamp(0, 1))
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=90)
    plt.close(figure)
