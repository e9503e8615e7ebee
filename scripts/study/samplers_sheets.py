"""The sheets of images of docs/samplers.md. Everything on them was made by the bundled model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

import sampler
from scripts.study import samplers_bundled, samplers_restore
from scripts.study.samplers_inverse import SHOWN, best_setting


def draw(folder: Path, tuned: Sequence[Mapping[str, str]]) -> None:
    """Both sheets: samplers at scale 10 and 6 steps, and restored images."""
    by_sampler(folder / "samplers_images_6_10.png")
    restored(folder / "samplers_restored.png", tuned)


def by_sampler(path: Path, steps: int = 6, scale: float = 10.0, images: int = 8) -> None:
    """The same prompts and seeds with every sampler, one row each."""
    engine = sampler.load()
    rows = {
        name: list(samplers_bundled.made(engine, spec, scale, steps, images)[0])
        for name, spec in samplers_bundled.SAMPLERS.items()
    }
    _sheet(rows, [], path)


def restored(path: Path, tuned: Sequence[Mapping[str, str]], images: int = 2) -> None:
    """Per operator: the true image, then each method's, for a few samples of the model."""
    engine = sampler.load()
    truth = samplers_restore.pictures(engine, SHOWN, images)
    rows = {}
    for task, case in samplers_restore.tasks().items():
        line = [truth]
        for method in samplers_restore.METHODS:
            setting = best_setting(tuned, task, method)
            line.append(samplers_restore.restored(engine, method, case, truth, setting))
        rows[task] = [made[i] for i in range(images) for made in line]
    _sheet(rows, ["true", *samplers_restore.METHODS] * images, path)


def _sheet(rows: Mapping[str, list[Tensor]], columns: Sequence[str], path: Path) -> None:
    """Images [3, H, W] in [0, 1] in a grid, rows named at the left, columns above."""
    wide = len(next(iter(rows.values())))
    figure, panels = plt.subplots(
        len(rows), wide, figsize=(wide + 1.5, len(rows) + 0.3), squeeze=False
    )
    for (name, line), row in zip(rows.items(), panels, strict=True):
        for image, axes in zip(line, row, strict=True):
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(textwrap.fill(name, 16), rotation=0, ha="right", va="center", fontsize=8)
    for name, axes in zip(columns, panels[0], strict=False):
        axes.set_title(name, fontsize=7)
    figure.subplots_adjust(left=1.5 / (wide + 1.5), right=0.995, top=0.96, bottom=0.005)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    figure.savefig(path, dpi=80)
    plt.close(figure)
