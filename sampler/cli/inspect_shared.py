"""Images, tables and files of the commands of `sampler inspect`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import expanded
from sampler.cli.report import Report, counted

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.core.adapter import PipelineAdapter

Row = dict[str, Any]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", metavar="DIR", callback=expanded,
        help="Folder of the table and pictures; default: runs/inspect-SUBJECT.",
    ),
]  # fmt: skip
Limit = Annotated[int, typer.Option(min=2, help="Maximum number of images to read.")]
Shares = Annotated[
    list[float] | None,
    typer.Option(
        "--t", min=0, max=1, help="Noise level, as a fraction of the training time; repeatable."
    ),
]


@dataclass(frozen=True)
class LoadedImages:
    """Images [N, 3, H, W] in [0, 1] of the model's size, their names, and prompts or None."""

    names: list[str]
    prompts: list[str | None]
    pixels: Tensor


def read_images(where: str, adapter: PipelineAdapter, limit: int, report: Report) -> LoadedImages:
    """Read a run folder or a folder of images, cropped and scaled to the model's size.

    Notes how many were left out or changed. Raises UsageError for a place without images.
    """
    import torch
    from PIL import Image, ImageOps

    from sampler.core.images import as_images
    from sampler.evaluation.pictures import open_pictures
    from sampler.runs.encodings import decode

    found = open_pictures(where).pictures
    height, width = adapter.size(None, None)
    pixels: list[Tensor] = []
    changed = 0
    for picture in found[:limit]:
        image = Image.fromarray(decode(picture.read())[0])
        changed += image.size != (width, height)
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels.append(as_images(fitted))
    if len(found) > limit:
        report.note(f"{where}: {limit} of {len(found)} images are read; --limit reads more.")
    if changed:
        report.note(f"{where}: {counted(changed, 'image')} cropped and scaled to {width}x{height}.")
    chosen = found[:limit]
    return LoadedImages([p.name for p in chosen], [p.prompt for p in chosen], torch.cat(pixels))


def read_labels(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Labels {column: [label of each image]} of a CSV file with a column `file`.

    Raises UsageError for a file without labels, and for an image without a row.
    """
    from sampler.core.errors import UsageError

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


def finish(
    report: Report, out: Path | None, subject: str, rows: Sequence[Row],
    files: Mapping[str, bytes], facts: Mapping[str, Any], shown: int = 40,
) -> None:  # fmt: skip
    """Print a table, write it as CSV and JSON beside the pictures, and print the folder.

    shown: rows that are printed; the files have all.
    """
    from sampler.core.durable import make_folder, write_file

    folder = out or Path("runs") / f"inspect-{subject}"
    make_folder(folder)
    plain = [{name: _finite(value) for name, value in row.items()} for row in rows]
    text = json.dumps({"subject": subject, **facts, "rows": plain}, indent=1, ensure_ascii=False)
    write_file(folder / f"{subject}.json", f"{text}\n".encode())
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(plain[0]))
    writer.writeheader()
    writer.writerows(plain)
    write_file(folder / f"{subject}.csv", buffer.getvalue().encode())
    for name, data in files.items():
        make_folder((folder / name).parent)
        write_file(folder / name, data)
    report.table(subject, plain, shown)
    report.event("summary", folder=str(folder), files=sorted(files))
    report.result(str(folder))


def _finite(value: Any) -> Any:
    """Numbers as JSON has them, with six digits: None for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
