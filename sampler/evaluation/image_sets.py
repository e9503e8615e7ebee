"""Sets of images of a model's size, with their prompts and labels, for inspections."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.errors import UsageError
from sampler.core.image_files import read_rgb
from sampler.core.images import as_images
from sampler.evaluation.pictures import open_pictures


@dataclass(frozen=True)
class LoadedImages:
    """Images [N, 3, H, W] in [0, 1] of the model's size, their names, and prompts or None.

    notes: sentences on images that were left out or changed.
    """

    names: list[str]
    prompts: list[str | None]
    pixels: Tensor
    notes: list[str]


def read_images(where: str, adapter: PipelineAdapter, limit: int) -> LoadedImages:
    """Read a run folder or a folder of images, cropped and scaled to the model's size.

    Raises UsageError for a place without images.
    """
    found = open_pictures(where).pictures
    height, width = adapter.size(None, None)
    pixels: list[Tensor] = []
    changed = 0
    for picture in found[:limit]:
        image = read_rgb(picture.read(), picture.name, on_white=True)
        changed += image.size != (width, height)
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels.append(as_images(fitted))
    notes: list[str] = []
    if len(found) > limit:
        notes.append(f"{where}: {limit} of {len(found)} images are read; --limit reads more.")
    if changed:
        images = "1 image" if changed == 1 else f"{changed} images"
        notes.append(f"{where}: {images} cropped and scaled to {width}x{height}.")
    chosen = found[:limit]
    return LoadedImages(
        [p.name for p in chosen], [p.prompt for p in chosen], torch.cat(pixels), notes
    )


def read_labels(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Labels {column: [label of each image]} of a CSV file with a column `file`.

    Raises UsageError for a file without labels, and for an image without a row.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: {reason.lower()}.") from None
    columns = [name for name in (rows[0] if rows else {}) if name and name != "file"]
    if not rows or "file" not in rows[0] or not columns:
        raise UsageError(f"{path}: a header is needed with 'file' and a column of labels.")
    by_name = {Path(row["file"]).as_posix(): row for row in rows}
    if missing := [name for name in names if name not in by_name]:
        raise UsageError(f"{path}: the image {missing[0]!r:.60} has no row.")
    return {c: [str(by_name[name][c] or "") for name in names] for c in columns}
