"""Batch runs on the command line: from a configuration to a run folder, and on to its images."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sampler.config import Config
from sampler.runs import axes, fingerprint, rows, tables
from sampler.runs.folder import Facts, Output, Run
from sampler.runs.jobs import Model, Settings
from sampler.runs.names import check_template, slug
from sampler.runs.plan import Plan, Planner
from sampler.runs.session import Place, Stop, held, place_of, signals, wait_for_plan
from sampler.runs.start import start
from sampler.runs.wildcards import Wildcards
from sampler.types import SamplerError

if TYPE_CHECKING:
    from sampler.cli.report import Report
    from sampler.engine import Engine
    from sampler.workers.execute import Request, Tally


@dataclass(frozen=True)
class How:
    """How a run is to be made. new: in a folder that is not there yet; fast: see fingerprint."""

    executor: str = "local"
    address: str | None = None
    new: bool = False
    dry: bool = False
    download: bool = False
    fast: bool = False


@dataclass(frozen=True)
class Source:
    """What a run is planned from: a configuration, prompts of the command line, axes of a sweep."""

    config: Config
    texts: Sequence[str] = ()
    axes: Sequence[axes.Axis] = ()
    fast: bool = False
    buffered: Sequence[tables.Line] | None = None
    skipped: list[str] = field(default_factory=list[str])

    def rows(self) -> Iterator[tables.Line]:
        """Arguments first, then the file; without arguments, those of the configuration."""
        if self.buffered is not None:
            return iter(self.buffered)
        prompts = self.config.prompts
        texts = self.texts or (() if prompts.file else prompts.texts or ())
        lines: Iterator[tables.Line] = (
            (f"prompt {k}", {"prompt": text}) for k, text in enumerate(texts, 1)
        )
        if prompts.file is not None:
            lines = itertools.chain(lines, tables.read_table(prompts.file, prompts.format))
        return axes.sweep(lines, list(self.axes)) if self.axes else lines

    @property
    def is_text(self) -> bool:
        """Whether cells are text, to be read as numbers where due."""
        file, kind = self.config.prompts.file, self.config.prompts.format
        kind = kind or Path(file or "x.txt").suffix.lstrip(".").lower() or "txt"
        return tables.is_text(kind)

    def model(self) -> Model:
        model = self.config.model
        from sampler.cli.models import with_lora

        found = fingerprint.model_of(model.path, model.revision, model.dtype, self.fast)
        return with_lora(found, model.lora)

    def planner(self, model: Model) -> Planner:
        """What makes jobs of the rows. Raises SamplerError (2) for a strategy that is wrong."""
        config, run = self.config, self.config.run
        scale = fingerprint.default_scale(config.model.path, config.model.revision)
        specs = {
            "sampler": config.sampler or "ddim",
            "guidance": config.guidance or {"name": "cfg", "scale": scale},
        }
        if isinstance(specs["guidance"], dict) and "name" not in specs["guidance"]:
            specs["guidance"] = {"name": "cfg", "scale": scale, **specs["guidance"]}
        if isinstance(specs["sampler"], dict) and "name" not in specs["sampler"]:
            specs["sampler"] = {"name": "ddim", **specs["sampler"]}
        try:
            resolved = {kind: rows.resolved(kind, spec) for kind, spec in specs.items()}
        except ValueError as error:
            raise SamplerError(str(error), 2) from None
        defaults = rows.Defaults(
            Settings(run.steps, run.height, run.width, **resolved),
            run.negative_prompt or "",
            run.seed if run.seed is not None or not self.axes else 0,
            run.n,
            limits=config.limits,
        )
        prompts = config.prompts
        folder = Path(prompts.wildcards) if prompts.wildcards else None
        skip = prompts.on_bad_row == "skip"
        return Planner(
            model,
            defaults,
            run.batch_size,
            dedupe=run.dedupe,
            expand=prompts.expand,
            wildcards=Wildcards(folder),
            skipped=(lambda error: self.skipped.append(str(error))) if skip else None,
        )

    def facts(self, model: Model) -> Facts:
        output = self.config.output
        if output.name_template is not None:
            check_template(output.name_template)
        kept = Output(output.metadata, output.name_template, output.flagged)
        plain: dict[str, Any] = {
            name: asdict(getattr(self.config, name)) for name in ("model", "output", "errors")
        }
        plain["axes"] = [asdict(axis) for axis in self.axes]
        return Facts(model, kept, plain)


def generate(source: Source, how: How, report: Report) -> None:
    """Plans and makes a run, or goes on with it. Raises SamplerError and typer.Exit."""
    from sampler.cli.dryrun import tell

    if source.config.prompts.file == tables.STDIN:
        # It can be read once, and a plan may need it twice.
        source = replace(source, buffered=list(source.rows()))
    load = engine_loader(source.config, how.download)
    if how.download:
        load()  # what is not in the local cache has to be there before it can be planned
    model = source.model()
    facts = source.facts(model)
    if how.dry:
        tell(source, model, report)
        return
    where = _where(source, model, how)
    check_folder(where)
    place = place_of(where, how.executor, source.config.output.fsync)
    with signals(report.note) as stop, held(place) as store:
        if place.rank == 0:
            run = start(store, source.planner(model), source.rows(), source.is_text, facts)
        else:
            run = wait_for_plan(store)
        for problem in source.skipped:
            report.event("warning", message=problem)
            report.note(f"sampler: skipped: {problem}")
        finish(run, place, source.config, how, report, stop, load)


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
    run: Run, place: Place, config: Config, how: How, report: Report, stop: Stop,
    load: Callable[[], Engine], retry_errors: bool = False, repair: bool = False,
) -> None:  # fmt: skip
    """Makes what is missing of a run and tells of it. Raises SamplerError (3, 5, 6, 7)."""
    if not run.missing(retry_errors=retry_errors, check="hash" if repair else "size"):
        tell_plan(run, report)
        report.event("summary", done=0, failed=0, skipped=run.total, out=run.store.where)
        report.note(f"All {run.total} images are in {run.store.where} already.")
        return
    from sampler.workers.execute import Options, Request, execute, outcome

    errors, output = config.errors, config.output
    options = Options(output.writer_threads, strict=errors.strict, max_errors=errors.max_errors)
    request = Request(retry_errors, "hash" if repair else "size", options)
    tell_plan(run, report)
    if how.executor == "ray":
        tally = _with_ray(run, config, how, request, report, stop)
    else:
        with report.progress(run.total) as meter:
            tally = execute(
                run,
                load,
                place,
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
    run: Run, config: Config, how: How, request: Request, report: Report, stop: Stop
) -> Tally:
    from sampler.cli.models import load_engine
    from sampler.workers.ray_pool import execute_on_ray

    with report.progress(run.total) as meter:
        told = meter.lines(run.store.where)
        return execute_on_ray(
            run, config.model, how.address, request, stop, told, meter.skip, load_engine
        )


def tell_plan(run: Run, report: Report) -> None:
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


def _tell_end(run: Run, tally: Tally, report: Report) -> None:
    counts = {"done": tally.done, "failed": tally.failed, "skipped": tally.skipped}
    report.event("summary", **counts, rows=tally.rows, out=run.store.where)
    more = f", {tally.failed} failed" if tally.failed else ""
    more += f", {tally.skipped} were there" if tally.skipped else ""
    report.note(f"{tally.done} images in {run.store.where}{more}.")


def _where(source: Source, model: Model, how: How) -> str:
    """The run folder: as asked for, or below runs/ with date, first prompt and plan in its name."""
    given = source.config.output.dir
    if given is None:
        planner = source.planner(model)
        first = next(planner.jobs(source.rows(), source.is_text))
        plan = plan_of(source, model)
        name = f"{slug(first.prompt, 24)}-{plan.hash[:4]}"
        found = sorted(Path("runs").glob(f"*-{name}"))
        if found and not how.new:
            return str(found[-1])
        given = str(Path("runs") / f"{datetime.date.today().isoformat()}-{name}")
    if not how.new:
        return given
    candidates = itertools.chain([given], (f"{given}-{k}" for k in itertools.count(2)))
    return next(path for path in candidates if not Path(path).exists())


def plan_of(source: Source, model: Model) -> Plan:
    """The plan alone; nothing is written."""
    planner = source.planner(model)
    for _ in planner.jobs(source.rows(), source.is_text):
        pass
    return planner.plan


def check_folder(where: str) -> None:
    """Refuses, before anything is computed, a place where no image can be written."""
    import os

    if "://" in where:
        return
    folder = Path(where)
    above = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not above.is_dir():
        raise SamplerError(f"{above} is a file; give a folder for the images.", 5)
    if not os.access(above, os.W_OK | os.X_OK):
        raise SamplerError(f"{above} is not writable.", 5)
