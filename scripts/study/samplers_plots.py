"""The pictures of docs/samplers.md and docs/restoring.md, from the studies' files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Rows = list[dict[str, str]]

MIXTURE = (
    "ddim",
    "ab 2",
    "ab 4",
    "heavy_ball 1.8",
    "ghvb 1.8",
    "ghvb 3.8",
    "dpmpp_2m",
    "unipc",
    "diffusers DEIS 2",
)


def draw(folder: Path, stored: Callable[[str], Rows]) -> None:
    """Draw every study that has rows."""
    for name, picture in (("mixture", mixture), ("bundled", bundled), ("inverse", inverse)):
        rows = stored(name)
        if rows:
            picture(rows, folder / f"samplers_{name}.png")


def mixture(rows: Rows, path: Path) -> None:
    """Error over steps, one panel per scale; and each sampler's ratio to the best fixed number."""
    scales = sorted({float(r["scale"]) for r in rows})
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), sharex=True)
    for scale, axes in zip(scales, panels.flat, strict=True):
        for name in MIXTURE:
            points = sorted(
                (int(r["steps"]), float(r["error"]))
                for r in rows
                if r["sampler"] == name and float(r["scale"]) == scale
            )
            axes.loglog(*zip(*points, strict=True), marker=".", label=name)
        axes.set(title=f"scale {scale:g}", ylim=(None, 20))
        axes.set_xticks([8, 12, 20, 30], labels=["8", "12", "20", "30"])
    panels[1, 1].set_xlabel("evaluations")
    panels[0, 0].set_ylabel("error, relative to the exact end")
    panels[0, 0].legend(fontsize=7)
    _save(figure, path)


def bundled(rows: Rows, path: Path) -> None:
    """Distance to the 500-step run, Fréchet distance and accuracy over steps, per scale."""
    scales = sorted({float(r["scale"]) for r in rows})
    figure, panels = plt.subplots(len(scales), 3, figsize=(13, 4 * len(scales)), squeeze=False)
    for scale, line in zip(scales, panels, strict=True):
        for axes, key in zip(line, ("distance", "frechet", "accuracy"), strict=True):
            for name in dict.fromkeys(r["sampler"] for r in rows):
                points = sorted(
                    (int(r["steps"]), float(r[key]))
                    for r in rows
                    if r["sampler"] == name and float(r["scale"]) == scale
                )
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=name)
            axes.set(xlabel="evaluations", title=f"{key}, scale {scale:g}")
        line[0].legend(fontsize=7)
    _save(figure, path)


def inverse(rows: Rows, path: Path) -> None:
    """PSNR per operator and method, with standard errors."""
    rows = [r for r in rows if r["task"] != "none" and not r["method"].startswith("reddiff, ")]
    names = list(dict.fromkeys(r["task"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = plt.subplots(figsize=(12, 4.5))
    for i, method in enumerate(methods):
        mine = {r["task"]: r for r in rows if r["method"] == method}
        places = [k + 0.8 * i / len(methods) for k, n in enumerate(names) if n in mine]
        values = [float(mine[n]["psnr"]) for n in names if n in mine]
        spread = [float(mine[n]["psnr_error"]) for n in names if n in mine]
        axes.bar(places, values, 0.8 / len(methods), yerr=spread, label=method)
    axes.set_xticks([k + 0.3 for k in range(len(names))], labels=names, fontsize=7)
    axes.set_ylabel("PSNR / dB")
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
