"""`sampler verify`: check every file of a run against its journal."""

from __future__ import annotations

import typer

from sampler.cli.options import Debug, Json, Quiet, Run
from sampler.cli.report import Report, counted


def command(
    run: Run,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every file of a run against its journal; exit code 3 if anything is wrong."""
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.open_run import open_run
        from sampler.runs.records import counts
        from sampler.runs.verify import findings

        found = open_run(run)
        wrong = 0
        for finding in findings(found):
            wrong += 1
            report.event("finding", kind=finding.kind, what=finding.what, problem=finding.problem)
            report.result(f"{finding.what}: {finding.problem}")
        tally = counts(found)
        report.event("summary", **tally, wrong=wrong)
        if wrong:
            report.note(
                f"{counted(wrong, 'problem')}; `sampler resume {run} --repair` regenerates images."
            )
            raise typer.Exit(3)
        report.note(f"{tally['ok']} of {found.total} images exist and are unchanged.")
