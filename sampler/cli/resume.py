"""`sampler resume`: complete a run folder with the plan stored in it."""

from __future__ import annotations

from typing import Annotated

import typer

from sampler.cli.options import (
    Address,
    Color,
    Debug,
    Device,
    Executor,
    Json,
    Quiet,
    Run,
    Verbose,
)
from sampler.cli.report import Report


def command(
    run: Run,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Retry failed images.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check every file's hash and regenerate damaged ones.")
    ] = False,
    device: Device = None,
    executor: Executor = "local",
    address: Address = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    color: Color = "auto",
) -> None:
    """Resume a run: generate the missing images with its stored plan."""
    report = Report(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with report.errors():
        from dataclasses import replace

        from sampler.cli import batch
        from sampler.cli.opened import config_of, engine_of, opened
        from sampler.runs.session import held, place_of, signals

        opened(run)  # a folder that is none is refused before it is locked
        place = place_of(run, executor)
        with signals(report.note) as stop, held(place):
            found = opened(run, place)
            config = config_of(found)
            if device is not None:
                config = replace(config, model=replace(config.model, device=device))
            how = batch.How(executor, address, retry_errors=retry_errors, repair=repair)
            load = lambda: engine_of(found, config)  # noqa: E731
            batch.finish(found, place, config, how, report, stop, load)
