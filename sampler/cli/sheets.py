"""`sampler grid`, `sampler gallery` and `sampler export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sampler.cli.options import Debug, Json, Run, expanded
from sampler.cli.report import Report, counted


def grid(
    run: Run,
    x: Annotated[str | None, typer.Option(help="Horizontal axis.")] = None,
    y: Annotated[str | None, typer.Option(help="Vertical axis.")] = None,
    columns: Annotated[
        int, typer.Option(min=0, help="Images per line without axes; 0: automatic.")
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw contact sheets of a run into its folder grids/, labelled with the axes of a sweep."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.cli.open_run import open_run
        from sampler.runs.grid import sheets

        found = open_run(run)
        for number, data in enumerate(sheets(found, x, y, columns)):
            name = f"grids/{number:03d}.png"
            found.store.put(name, data)
            report.event("grid", file=f"{found.store.where}/{name}")
            report.result(f"{found.store.where}/{name}")


def gallery(
    run: Run,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write gallery.html into a run folder: thumbnails, filters and records, without scripts."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.cli.open_run import open_run
        from sampler.runs.gallery import page

        found = open_run(run)
        found.store.put("gallery.html", page(found).encode())
        report.event("gallery", file=f"{found.store.where}/gallery.html")
        report.result(f"{found.store.where}/gallery.html")


def export(
    run: Run,
    to: Annotated[Literal["csv", "parquet", "webdataset"], typer.Option(help="Format to write.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", callback=expanded, help="File or folder.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a run, complete or not, as a table or as shards of images with records."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.cli.open_run import open_run
        from sampler.runs import export

        found = open_run(run)
        name = "shards" if to == "webdataset" else f"results.{to}"
        path = out or (Path(name) if "://" in run else Path(found.store.where) / name)
        writers = {
            "csv": export.export_csv,
            "parquet": export.export_parquet,
            "webdataset": export.export_webdataset,
        }
        count = writers[to](found, path)
        report.event("export", file=str(path), count=count)
        report.result(str(path))
        report.note(f"{counted(count, 'image')}.")
