"""Run a plan to completion and map the outcome to an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sampler import registry
from sampler.core.binding import SamplerContext, bind_sampler
from sampler.core.errors import IncompleteError, MemoryLimitError, ModelError
from sampler.core.loop import Loop
from sampler.runs.folder import RunFolder
from sampler.runs.location import RunLocation
from sampler.runs.relocation import groups_again
from sampler.runs.stop import StopFlag
from sampler.workers import claims
from sampler.workers.batch_runner import runs_hosted
from sampler.workers.work import JournalLines, Tally, WorkOptions, dtype_of, work


def execute(
    run: RunFolder,
    load: Callable[[], Loop],
    location: RunLocation,
    options: WorkOptions,
    stop: StopFlag,
    on_written: Callable[[JournalLines], None] = lambda lines: None,
    on_start: Callable[[int], None] = lambda skipped: None,
) -> Tally:
    """Generate what is missing, in this process. The engine is loaded only if something is.

    on_start: receives the number of images that exist; on_written: lines that are on disk.

    Raises StorageError, ModelError for another model than the run's, IncompleteError above
    max_errors.
    """
    missing = run.missing(retry_errors=options.retry_errors, check=options.check)
    tally = Tally(skipped=run.total - sum(len(jobs) for jobs in missing.values()))
    on_start(tally.skipped)
    if not missing:
        return tally
    engine = load()
    check_dtype(run, engine)
    _check(run, engine)
    batches: Iterable[int] = sorted(missing)
    if location.world > 1:
        chosen = [run.batches[number] for number in missing]
        # Others have made images while the engine was loaded.
        missing = run.missing(
            retry_errors=options.retry_errors, check=options.check, batches=chosen
        )

        def remaining() -> dict[int, list[int]]:
            return run.missing(check=options.check, batches=chosen)

        batches = claims.claimed_batches(location, missing, remaining, stop, options.lease)
    work(run, engine, batches, missing, options, tally, on_written, stop)
    if location.world > 1:
        tally.stopped |= stop()  # perhaps while waiting for the others
        if not tally.stopped:
            claims.remove_claims(location)
    return tally


def check_dtype(run: RunFolder, engine: Loop) -> None:
    """Raise ModelError where the dtype "auto" is not what it was for the images that exist."""
    entries = run.results().entries.values()
    before = {entry["dtype"] for entry in entries if "dtype" in entry}
    if before and dtype_of(engine) not in before:
        raise ModelError(
            f"{run.store.where} was begun in {min(before)}, and the model has {dtype_of(engine)} "
            f"here; give --dtype {min(before)}."
        )


def _check(run: RunFolder, engine: Loop) -> None:
    """Raise ValueError, before anything is computed, for what would fail every image of a group."""
    for settings in groups_again(run):
        if runs_hosted(engine, settings):
            engine.as_hosted().check_stock(settings, run.jobs())
            continue
        adapter = engine.with_grid_for(
            settings.grid, settings.sampler, settings.guidance, settings.steps
        ).pipeline
        size = adapter.size(settings.height, settings.width)
        grid = adapter.grid(settings.steps, size)
        rule = registry.build("guidance", settings.guidance)
        rule.check(adapter)
        if missing := rule.needs - {"cond", "uncond", *adapter.models}:
            raise ValueError(f"Guidance {rule.name!r} needs the model {min(missing)!r}.")
        method = registry.build("sampler", settings.sampler)
        bind_sampler(method, SamplerContext(adapter, grid, dict(settings.guidance), size))


def raise_for(tally: Tally, where: str) -> None:
    """Raise MemoryLimitError or IncompleteError if images failed."""
    if tally.failed and not tally.done and tally.oom == tally.failed:
        raise MemoryLimitError("Out of memory with one image at a time; use a smaller size.")
    if tally.failed:
        raise IncompleteError(
            f"{tally.failed} image{'s' if tally.failed > 1 else ''} failed; "
            f"`sampler show {where} --errors` prints the reasons, "
            f"`sampler resume {where} --retry-errors` tries again.",
        )
