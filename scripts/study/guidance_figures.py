"""The figures of the guidance study."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

_SCALE = re.compile(r"(cfg|apg) (\d+)")


def write_figures(folder: Path, rows: list[dict[str, Any]], images: Mapping[str, Tensor]) -> None:
    """guidance_scales.png, guidance_rows.png, guidance_strips.png, guidance_sheet.png."""
    _scales(folder / "guidance_scales.png", rows)
    _against_rows(folder / "guidance_rows.png", rows)
    strips = {k: v for k, v in images.items() if _SCALE.fullmatch(k)}
    order = sorted(strips, key=lambda name: (name[:3], int(name[4:])))
    _sheet(folder / "guidance_strips.png", {k: strips[k] for k in order}, range(16, 24))
    _sheet(folder / "guidance_sheet.png", images, range(8))


def _scales(path: Path, rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2))
    names = {
        "frechet": "Fréchet distance",
        "accuracy": "prompt accuracy",
        "saturation": "saturation",
        "clipped": "clipped share",
    }
    for axis, (key, label) in zip(axes, names.items(), strict=True):
        for rule, colour in (("cfg", "tab:red"), ("apg", "tab:blue")):
            found = [(int(m[2]), r) for r in rows if (m := _SCALE.fullmatch(r["point"]))]
            found = sorted((s, r) for s, r in found if r["point"].startswith(rule))
            scales, y = [s for s, _ in found], [r[key] for _, r in found]
            axis.plot(scales, y, "o-", color=colour, label=rule)
            low, high = ([r[f"{key}_{end}"] for _, r in found] for end in ("low", "high"))
            axis.fill_between(scales, low, high, color=colour, alpha=0.15)
        axis.set_xlabel("scale")
        axis.set_title(label, fontsize=10)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _against_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key in zip(axes, ("ssim", "accuracy"), strict=True):
        for row in rows:
            if row["study"] != "b" and row["point"] not in ("cfg 3", "none"):
                continue
            gap = [[row[key] - row[f"{key}_low"]], [row[f"{key}_high"] - row[key]]]
            gap = torch.tensor(gap).clamp(min=0)
            axis.errorbar(row["rows"], row[key], yerr=gap, fmt="o", label=row["point"])
        axis.set_xlabel("network rows per image")
        axis.set_title({"ssim": "SSIM to full CFG", "accuracy": "prompt accuracy"}[key])
    axes[1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _sheet(path: Path, images: Mapping[str, Tensor], columns: range) -> None:
    """One row of images per point, the same prompts and seeds in every column."""
    figure, axes = plt.subplots(len(images), 1, figsize=(9, 1.05 * len(images)))
    for axis, (name, pictures) in zip(axes, images.items(), strict=True):
        strip = torch.cat([pictures[k] for k in columns], 2).permute(1, 2, 0)
        axis.imshow(strip)
        axis.set_axis_off()
        axis.text(-6, 32, name, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(left=0.22, right=0.99, top=0.99, bottom=0.01, hspace=0.05)
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True})
    plt.close(figure)
