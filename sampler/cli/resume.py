"""`sampler resume`: complete a run folder with the plan stored in it."""

from __future__ import annotations

from typing import Annotated

import typer

from sampler.cli.options import (
    Address,
    Color,
    Debug,
    Executor,
    Json,
    ModelOptions,
    Quiet,
    Run,
    Verbose,
    takes_model_options,
)
from sampler.cli.report import Report


@takes_model_options(leave_out=("grid",))
def command(
    run: Run,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Retry failed images.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check every file's hash and regenerate damaged ones.")
    ] = False,
    *,
    model: ModelOptions,
    executor: Executor = "local",
    address: Address = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    color: Color = "auto",
) -> None:
    """Resume a run: generate the missing images with its stored plan.

    The means and maps of a run of `sampler restore` are written again.
    """
    report = Report(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with report.errors():
        from functools import partial

        from sampler.cli import batch
        from sampler.cli.open_run import (
            check_model,
            config_of,
            engine_of,
            open_run,
            with_model,
        )
        from sampler.cli.restore import draw_summaries
        from sampler.runs.location import location_for, open_locked
        from sampler.runs.restored import RESTORED
        from sampler.runs.stop import stop_on_signals

        open_run(run)  # refuse what is not a run folder before locking it
        location = location_for(run, executor)
        with stop_on_signals(report.note) as stop, open_locked(location):
            found = open_run(run, location)
            config = with_model(config_of(found), model)
            if model:
                check_model(found, config.model)
            options = batch.RunOptions(executor, address, retry_errors=retry_errors, repair=repair)
            load = partial(engine_of, found, config.model)
            batch.finish(found, location, config, options, report, stop, load)
        if found.config.get(RESTORED) and location.rank == 0:
            draw_summaries(location.where, report)
