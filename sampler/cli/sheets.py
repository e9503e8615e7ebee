"""`sampler grid` and `sampler gallery`: a run to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sampler.cli.options import Debug, Json
from sampler.cli.report import Report, counted


def grid(
    run: Annotated[str, typer.Argument(help="The run folder, or its URL.")],
    x: Annotated[str | None, typer.Option(help="The axis that goes across.")] = None,
    y: Annotated[str | None, typer.Option(help="The axis that goes down.")] = None,
    columns: Annotated[
        int, typer.Option(min=0, help="Images across, without axes; 0 chooses.")
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw contact sheets of a run into its folder grids/, with the values of a sweep."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.cli.opened import opened
        from sampler.runs.grid import sheets

        found = opened(run)
        for number, data in enumerate(sheets(found, x, y, columns)):
            name = f"grids/{number:03d}.png"
            found.store.put(name, data)
            report.event("grid", file=f"{run}/{name}")
            report.result(f"{run}/{name}")


def gallery(
    run: Annotated[str, typer.Argument(help="The run folder, or its URL.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write gallery.html into a run folder: thumbnails, filters and records, without scripts."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.cli.opened import opened
        from sampler.runs.gallery import page

        found = opened(run)
        found.store.put("gallery.html", page(found).encode())
        report.event("gallery", file=f"{run}/gallery.html")
        report.result(f"{run}/gallery.html")


def export(
    run: Annotated[str, typer.Argument(help="The run folder, or its URL.")],
    to: Annotated[str, typer.Option("--to", help="csv, parquet or webdataset.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File or folder.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run, finished or not, as a table or as shards of images with records."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.cli.generate import choice
        from sampler.cli.opened import opened
        from sampler.runs import export

        choice("--to", to, ("csv", "parquet", "webdataset"))
        found = opened(run)
        name = "shards" if to == "webdataset" else f"results.{to}"
        path = out or (Path(name) if "://" in run else Path(run) / name)
        writers = {
            "csv": export.export_csv,
            "parquet": export.export_parquet,
            "webdataset": export.export_webdataset,
        }
        count = writers[to](found, path)
        report.event("export", file=str(path), count=count)
        report.result(str(path))
        report.note(f"{counted(count, 'image')}.")
