"""`sampler resume`: goes on with a run folder, from what is stored in it."""

from __future__ import annotations

from typing import Annotated

import typer

from sampler.cli.options import Color, Debug, Json, Quiet, Verbose
from sampler.cli.report import Report


def command(
    run: Annotated[str, typer.Argument(help="The run folder, or its URL.")],
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Make images again that failed.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check every file's hash; make again what is wrong.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    executor: Annotated[str, typer.Option(help="local, torchrun or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default: local.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    color: Color = "auto",
) -> None:
    """Go on with a run: make what is missing, with its stored plan."""
    report = Report(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with report.errors():
        from dataclasses import replace

        from sampler.cli import batch
        from sampler.cli.generate import choice
        from sampler.cli.opened import config_of, engine_of, opened
        from sampler.runs.session import held, place_of, signals

        choice("--executor", executor, ("local", "torchrun", "ray"))
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
