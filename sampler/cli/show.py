"""`sampler show`: records of a run folder or of an image."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import Debug, Json
from sampler.cli.report import Report

if TYPE_CHECKING:
    from sampler.runs.folder import RunFolder


def command(
    what: Annotated[str, typer.Argument(help="Run folder, RUN#KEY, or image.")],
    errors: Annotated[bool, typer.Option("--errors", help="Show failed images only.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the records of a run, or the record inside an image."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.cli.open_run import open_run, split_key
        from sampler.runs.foreign import fields_of
        from sampler.runs.metadata import foreign_metadata, read_metadata

        where, key = split_key(what)
        if key:
            _show_job(open_run(where), key, report)
        elif os.path.isfile(where):
            with open(where, "rb") as stream:
                data = stream.read()
            found = foreign_metadata(data)
            _show(read_metadata(data) if found is None else dict(fields_of(found)), report)
        else:
            _show_all(open_run(where), errors, report)


def _show_job(run: RunFolder, key: str, report: Report) -> None:
    from sampler.cli.open_run import index_of
    from sampler.runs.records import records

    index = index_of(run, key)
    _show(next(record for record in records(run) if record["index"] == index), report)


def _show_all(run: RunFolder, errors: bool, report: Report) -> None:
    from sampler.runs.records import counts, records

    for record in records(run):
        if errors and record["status"] != "error":
            continue
        report.event("record", **record)
        detail = record["error"] or record["file"] or ""
        report.result(
            f"{record['index']:06d} {record['status']:7} {record['key'][:10]} "
            f"seed {record['seed']} {record['guidance']['name']} {record['sampler']['name']} "
            f"{record['prompt'][:60]!r} {detail}"
        )
    tally = counts(run)
    report.event("summary", **tally, duplicates=len(run.duplicates), batches=len(run.batches))
    report.note(", ".join(f"{count} {status}" for status, count in tally.items()))


def _show(record: dict[str, Any], report: Report) -> None:
    report.event("record", **record)
    report.result(json.dumps(record, ensure_ascii=False, indent=1))
