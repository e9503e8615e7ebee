"""Batch runs on the command line: from a plan to a run folder, and on to its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from sampler import registry
from sampler.cli.dryrun import tell
from sampler.cli.report import Report, counted
from sampler.config.schema import Config
from sampler.model_files.folder import default_strategies
from sampler.runs import tables
from sampler.runs.folder import RunFolder
from sampler.runs.location import (
    RunLocation,
    StopFlag,
    location_for,
    open_locked,
    stop_on_signals,
    wait_for_plan,
)
from sampler.runs.source import Source, check_folder, folder_of
from sampler.runs.start import start

if TYPE_CHECKING:
    from sampler.engine import Engine
    from sampler.workers.execute import Request, Tally


@dataclass(frozen=True)
class RunOptions:
    """How a run is to be made. new: in a folder that is not there yet.

    retry_errors, repair: what counts as missing besides what is not there.
    """

    executor: str = "local"
    address: str | None = None
    new: bool = False
    dry: bool = False
    download: bool = False
    retry_errors: bool = False
    repair: bool = False


def generate(source: Source, how: RunOptions, report: Report) -> None:
    """Plans and makes a run, or goes on with it. Raises SamplerError and typer.Exit."""
    if source.config.prompts.file == tables.STDIN:
        # It can be read once, and a plan may need it twice.
        source = replace(source, buffered=list(source.rows()))
    config = source.config
    load = engine_loader(config, how.download)
    if how.download:
        load()  # what is not in the local cache has to be there before it can be planned
    model = source.model()
    if not (how.dry or source.named() or default_strategies(model.path, config.model.revision)):
        source = replace(source, defaults=_defaults(load()))
    facts = source.facts(model)
    if how.dry:
        tell(source, model, report)
        return
    where = folder_of(source, model, how.new)
    check_folder(where)
    location = location_for(where, how.executor, config.output.fsync)
    with stop_on_signals(report.note) as stop, open_locked(location) as store:
        if location.rank == 0:
            run = start(store, source.planner(model), source.rows(), source.is_text, facts)
        else:
            run = wait_for_plan(store)
        for problem in dict.fromkeys(source.skipped):  # rows may be read more than once
            report.event("warning", message=problem)
            report.note(f"sampler: skipped: {problem}")
        finish(run, location, config, how, report, stop, load)


def _defaults(engine: Engine) -> dict[str, Any]:
    """The sampler and the guidance of a loaded model."""
    return {
        "sampler": registry.spec_of(engine.sampler),
        "guidance": registry.spec_of(engine.guidance),
    }


def engine_loader(config: Config, download: bool) -> Callable[[], Engine]:
    """The engine of a configuration, loaded once, when it is asked for."""
    loaded: list[Engine] = []

    def load() -> Engine:
        from sampler.cli.models import load_engine

        if not loaded:
            loaded.append(load_engine(config.model, download))
        return loaded[0]

    return load


def finish(
    run: RunFolder,
    location: RunLocation,
    config: Config,
    how: RunOptions,
    report: Report,
    stop: StopFlag,
    load: Callable[[], Engine],
) -> None:
    """Makes what is missing of a run and tells of it. Raises SamplerError (3, 5, 6, 7)."""
    check = "hash" if how.repair else "size"
    if not run.missing(retry_errors=how.retry_errors, check=check):
        tell_plan(run, report)
        report.event("summary", done=0, failed=0, skipped=run.total, out=run.store.where)
        what = "The image is" if run.total == 1 else f"All {run.total} images are"
        report.note(f"{what} in {run.store.where} already.")
        return
    from sampler.workers.execute import Options, Request, execute, outcome

    errors, output = config.errors, config.output
    options = Options(
        output.writer_threads,
        strict=errors.strict,
        max_errors=errors.max_errors,
        on_oom=errors.on_oom,
        on_nonfinite=errors.on_nonfinite,
        drop_encoders=config.model.drop_encoders,
    )
    request = Request(how.retry_errors, check, options)
    tell_plan(run, report)
    if how.executor == "ray":
        tally = _with_ray(run, config, how, request, report, stop)
    else:
        with report.progress(run.total) as meter:
            tally = execute(
                run,
                load,
                location,
                request,
                stop,
                meter.lines(run.store.where),
                meter.skip,
            )
    _tell_end(run, tally, report)
    if tally.stopped:
        report.note(f"Stopped. `sampler resume {run.store.where}` goes on.")
        raise typer.Exit(128 + (stop.signal or 2))
    outcome(tally, run.store.where)


def _with_ray(
    run: RunFolder,
    config: Config,
    how: RunOptions,
    request: Request,
    report: Report,
    stop: StopFlag,
) -> Tally:
    from sampler.cli.models import load_engine
    from sampler.workers.ray_pool import execute_on_ray

    with report.progress(run.total) as meter:
        told = meter.lines(run.store.where)
        return execute_on_ray(
            run, config.model, how.address, request, stop, told, meter.skip, load_engine
        )


def tell_plan(run: RunFolder, report: Report) -> None:
    """The event "plan", and for who wants to see it, the settings."""
    first = run.groups[0]
    plan = {
        "images": run.total,
        "batches": len(run.batches),
        "batch_size": max(len(batch.jobs) for batch in run.batches),
        "groups": len(run.groups),
        "duplicates": len(run.duplicates),
        "steps": first.steps,
        "sampler": first.sampler,
        "guidance": first.guidance,
        "model": run.model.label,
        "out": run.store.where,
    }
    report.event("plan", **plan)
    for name, value in plan.items():
        report.detail(f"{name}: {value}")


def _tell_end(run: RunFolder, tally: Tally, report: Report) -> None:
    counts = {"done": tally.done, "failed": tally.failed, "skipped": tally.skipped}
    report.event("summary", **counts, rows=tally.rows, out=run.store.where)
    more = f", {tally.failed} failed" if tally.failed else ""
    more += f", {tally.skipped} were there" if tally.skipped else ""
    report.note(f"{counted(tally.done, 'image')} in {run.store.where}{more}.")
