"""Batch runs on the command line: prompts to a plan, a run folder, and its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sampler import registry
from sampler.cli.open_run import open_run
from sampler.cli.report import Report, counted
from sampler.cli.run_report import print_estimate, report_end, report_existing, report_plan
from sampler.config.schema import Config
from sampler.core.errors import UsageError
from sampler.models.folder import default_strategies
from sampler.runs.extend import extend
from sampler.runs.folder import RunFolder
from sampler.runs.location import (
    RunLocation,
    check_writable,
    default_folder,
    location_for,
    open_locked,
    recorded_config,
    unused,
    wait_for_plan,
)
from sampler.runs.source import DRAWN, Source
from sampler.runs.start import PlannedRun, start
from sampler.runs.stop import StopFlag, stop_on_signals
from sampler.runs.store import Store

if TYPE_CHECKING:
    from sampler.engine import Engine
    from sampler.workers.work import Tally, WorkOptions


@dataclass(frozen=True)
class RunOptions:
    """Options with which the command line runs a plan.

    new: always in a new folder. extend: add to the run in the folder. retry_errors, repair: failed
    and damaged images count as missing.
    """

    executor: str = "local"
    address: str | None = None
    new: bool = False
    dry_run: bool = False
    download: bool = False
    retry_errors: bool = False
    repair: bool = False
    extend: bool = False


def generate(
    source: Source,
    options: RunOptions,
    report: Report,
    on_load: Callable[[Engine], None] | None = None,
) -> str | None:
    """Plan a run, and start or resume it; return its folder, None for a dry run.

    on_load: called with the engine once it is loaded. Raises SamplerError and typer.Exit.
    """
    config, where = source.config, source.config.output.dir
    if options.executor == "torchrun" and (where is None or options.new):
        raise UsageError("--executor torchrun needs -o DIR, the same for every rank, and no --new.")
    if options.extend:
        _check_extendable(where, options)
    load = engine_loader(config, options.download, on_load)
    if options.download:
        load()  # the model has to be in the local cache before it can be planned
    model, given = source.model(), config.model
    known = source.names_strategies() or default_strategies(
        given.path, given.revision, given.config
    )
    if not (options.dry_run or known):
        source = replace(source, defaults=_defaults(load()))
    if where is not None and not (options.new or options.dry_run):
        source = replace(source, drawn=recorded_config(where).get(DRAWN))
    location = location_for(where or "", options.executor, config.output.fsync)
    planned = source.plan(model) if location.rank == 0 else None
    if ignored := source.unused():
        report.detail(f"files of the model that are not read: {', '.join(ignored)}")
    for problem in source.skipped:
        report.event("warning", message=problem)
        report.note(f"sampler: skipped: {problem}")
    for note in source.notes:
        report.event("warning", message=note)
        report.note(f"sampler: {note}.")
    if planned is not None:
        if options.dry_run:
            print_estimate(planned, report)
            return None
        if count := len(planned.plan.duplicates):
            images = "1 image is" if count == 1 else f"{count} images are"
            report.note(
                f"{images} equal to earlier ones and generated once (generate --no-dedupe repeats "
                "them)."
            )
        folder = where or str(_default_folder(planned))
        location = replace(location, where=unused(folder) if options.new else folder)
    check_writable(location.where)
    with stop_on_signals(report.note) as stop, open_locked(location) as store:
        run = wait_for_plan(store) if planned is None else _started(store, planned, options, report)
        finish(run, location, config, options, report, stop, load)
    return location.where


def _check_extendable(where: str | None, options: RunOptions) -> None:
    if where is None or options.new or options.executor == "torchrun":
        raise UsageError("--extend needs the run folder -o DIR, no --new and no torchrun.")
    open_run(where)


def _started(store: Store, planned: PlannedRun, options: RunOptions, report: Report) -> RunFolder:
    """Run of a plan in its store: new, the same as before, or with the images of the plan added."""
    if not options.extend:
        return start(store, planned)
    found = extend(store, planned)
    before = found.run.total - found.added
    report.note(f"{counted(found.added, 'image')} added to the {before} of {store.where}.")
    return found.run


def _default_folder(planned: PlannedRun) -> Path:
    output = asdict(planned.output)
    return default_folder(planned.first.prompt, planned.plan.hash, output=output)


def _defaults(engine: Engine) -> dict[str, Any]:
    """Default sampler and guidance of a loaded model."""
    return {
        "sampler": registry.spec_of(engine.sampler),
        "guidance": registry.spec_of(engine.guidance),
    }


def engine_loader(
    config: Config, download: bool, on_load: Callable[[Engine], None] | None = None
) -> Callable[[], Engine]:
    """Function that loads the engine of a configuration once, and then calls on_load."""
    loaded: list[Engine] = []

    def load() -> Engine:
        from sampler.cli.models import load_engine

        if not loaded:
            loaded.append(load_engine(config.model, download))
            if on_load is not None:
                on_load(loaded[0])
        return loaded[0]

    return load


def finish(
    run: RunFolder,
    location: RunLocation,
    config: Config,
    options: RunOptions,
    report: Report,
    stop: StopFlag,
    load: Callable[[], Engine],
) -> None:
    """Generate what is missing and report the outcome. Raises SamplerError and typer.Exit."""
    check = "hash" if options.repair else "size"
    report_plan(run, report)
    missing = run.missing(retry_errors=options.retry_errors, check=check)
    if location.rank == 0:
        report_existing(run, missing, report)
    if not missing:
        report.event("summary", done=0, failed=0, skipped=run.total, out=run.store.where)
        what = "The image exists" if run.total == 1 else f"All {run.total} images exist"
        report.note(f"{what} already in {run.store.where}.")
        return
    from sampler.workers.execute import execute, raise_for
    from sampler.workers.work import WorkOptions

    errors = config.errors
    work_options = WorkOptions(
        options.retry_errors,
        check,
        writer_threads=config.output.writer_threads,
        strict=errors.strict,
        max_errors=errors.max_errors,
        on_oom=errors.on_oom,
        on_nonfinite=errors.on_nonfinite,
        drop_encoders=config.model.drop_encoders,
    )
    if options.executor == "ray":
        tally = _run_on_ray(run, config, options, work_options, report, stop)
    else:
        with report.progress(run.total) as meter:
            on_written = meter.lines(run.store.where)
            tally = execute(run, load, location, work_options, stop, on_written, meter.skip)
    report_end(run, tally, report)
    if tally.stopped:
        report.note(f"Stopped. `sampler resume {run.store.where}` continues the run.")
        raise typer.Exit(128 + (stop.signal or 2))
    raise_for(tally, run.store.where)


def _run_on_ray(
    run: RunFolder,
    config: Config,
    options: RunOptions,
    work_options: WorkOptions,
    report: Report,
    stop: StopFlag,
) -> Tally:
    from sampler.cli.open_run import engine_of
    from sampler.workers.ray_pool import execute_on_ray

    with report.progress(run.total) as meter:
        return execute_on_ray(
            run,
            config.model,
            options.address,
            work_options,
            stop,
            meter.lines(run.store.where),
            meter.skip,
            engine_of,
        )
