"""Extension of a run by further jobs; existing files and batches stay.

A planned job that the run has already is not added. The three files of the plan are replaced one
after the other; until plan.json is, readers see the run as it was.
"""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import IO

from sampler.core.errors import RunFolderError
from sampler.runs.folder import JOBS, RunFolder, key_in
from sampler.runs.jobs import Job, JobSettings, canonical, model_differences
from sampler.runs.plan import Cell, Plan, PlannedBatch, plan_digest
from sampler.runs.start import SPOOL_BYTES, PlannedRun, write_plan
from sampler.runs.store import Store


@dataclass(frozen=True)
class Extended:
    """The run with its new jobs. added: their number."""

    run: RunFolder
    added: int


def extend(store: Store, planned: PlannedRun) -> Extended:
    """Add the jobs of a plan that a run does not have yet.

    If the plan holds all jobs of the run, lines are counted as in the plan, else from the run's
    last line on. Raises RunFolderError for another model, other output options or other axes.
    """
    run = RunFolder(store)
    _check(run, planned)
    index_of = {run.key(index): index for index in range(run.total)}
    places = array("I")  # number in the run of every planned job
    for line in _lines(planned.jobs):
        places.append(index_of.setdefault(key_in(line), len(index_of)))
    added = len(index_of) - run.total
    known = len(places) - added
    if not added:
        return Extended(run, 0)
    whole = known == run.total
    groups = [*run.groups]
    positions = [_position(groups, settings) for settings in planned.plan.groups]
    plan = Plan(planned.plan.batch_size, planned.plan.dedupe, groups, [array("I") for _ in groups])
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        digest = plan_digest(plan.batch_size, plan.dedupe)
        for job in _jobs(run, planned, places, positions, whole):
            if job.index >= run.total:
                plan.members[job.group].append(job.index)
            digest.update(job.key.encode())
            spool.write(job.encode())
        plan.jobs, plan.hash = len(index_of), digest.hexdigest()
        _add_lines(plan, run, planned, places, whole)
        spool.seek(0)
        with store.new(JOBS) as stream:
            shutil.copyfileobj(spool, stream, 2**20)
    new = [PlannedBatch(b.id + len(run.batches), b.group, b.jobs) for b in plan.batches()]
    write_plan(store, planned, plan, [*run.batches, *new])
    return Extended(RunFolder(store), added)


def _check(run: RunFolder, planned: PlannedRun) -> None:
    different = [*model_differences(run.model.identity, planned.model.identity)]
    if asdict(run.output) != asdict(planned.output):
        different.append("output")
    before, after = (
        [axis["name"] for axis in config.get("axes", ())] for config in (run.config, planned.config)
    )
    if before != after:
        different.append("axes")
    if different:
        raise RunFolderError(
            f"{run.store.where} cannot be extended; different: {', '.join(different)}. Use another "
            "folder (-o), or --new for a new one."
        )


def _position(groups: list[JobSettings], settings: JobSettings) -> int:
    """Number of equal settings among the groups of a run, which new ones are added to."""
    text = canonical(asdict(settings))
    for number, known in enumerate(groups):
        if canonical(asdict(known)) == text:
            return number
    groups.append(settings)
    return len(groups) - 1


def _jobs(
    run: RunFolder, planned: PlannedRun, places: array[int], positions: list[int], whole: bool
) -> Iterator[Job]:
    """Yield the jobs of the run, then the new ones."""
    lines: dict[int, int] = {}
    if whole:
        jobs = map(Job.parse, _lines(planned.jobs))
        lines = {place: job.line for job, place in zip(jobs, places, strict=True)}
    for job in run.jobs():
        yield replace(job, line=lines.get(job.index, job.line))
    first = 0 if whole else run.lines
    for line, place in zip(_lines(planned.jobs), places, strict=True):
        if place >= run.total:
            job = Job.parse(line)
            yield replace(job, index=place, line=first + job.line, group=positions[job.group])


def _add_lines(
    plan: Plan, run: RunFolder, planned: PlannedRun, places: array[int], whole: bool
) -> None:
    """Lines, and what several of them share: as planned, or behind those of the run."""
    first, new = 0 if whole else run.lines, planned.plan
    plan.lines = first + new.lines
    plan.duplicates = [(first + line, places[index]) for line, index in new.duplicates]
    plan.cells = [
        Cell(first + cell.line, cell.place, places[cell.job], cell.axes) for cell in new.cells
    ]
    if not whole:
        jobs = map(Job.parse, _lines(planned.jobs))
        pairs = zip(jobs, places, strict=True)
        known = [(first + job.line, place) for job, place in pairs if place < run.total]
        plan.duplicates = [*run.duplicates, *sorted([*known, *plan.duplicates])]
        plan.cells = [*run.cells, *plan.cells]


def _lines(jobs: IO[bytes]) -> Iterator[bytes]:
    jobs.seek(0)
    return iter(jobs.readline, b"")
