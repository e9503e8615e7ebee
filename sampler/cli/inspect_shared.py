"""Images, tables and files of the commands of `sampler inspect`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import expanded
from sampler.cli.report import Report

if TYPE_CHECKING:
    from sampler.core.adapter import PipelineAdapter
    from sampler.evaluation.image_sets import LoadedImages

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


def read_images(where: str, adapter: PipelineAdapter, limit: int, report: Report) -> LoadedImages:
    """Read images for the model, and note how many were left out or changed."""
    from sampler.evaluation.image_sets import read_images

    found = read_images(where, adapter, limit)
    for note in found.notes:
        report.note(note)
    return found


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
