"""Printed plan, existing images, end and estimate of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sampler import registry
from sampler.cli.report import Report, counted
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import JobSettings
from sampler.runs.names import image_name
from sampler.runs.start import PlannedRun
from sampler.types import Level

if TYPE_CHECKING:
    from sampler.workers.work import Tally


BYTES_PER_PIXEL = 1.7  # of PNGs of the bundled model, with metadata
BYTES_PER_JOB = 700  # its lines in jobs.jsonl and the journal


def report_plan(run: RunFolder, report: Report) -> None:
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


def report_existing(run: RunFolder, missing: Mapping[int, Sequence[int]], report: Report) -> None:
    """Print the paths of the images that exist, so that stdout always lists the whole run."""
    left = {run.key(index) for indices in missing.values() for index in indices}
    entries = run.results().entries
    for index in range(run.total):
        entry = entries.get(run.key(index), {})
        if entry.get("status") == "ok" and run.key(index) not in left:
            file = f"{run.store.where}/{entry['file']}"
            report.event("item", **{**entry, "file": file, "existed": True})
            report.result(file)


def report_end(run: RunFolder, tally: Tally, report: Report) -> None:
    counts = {"done": tally.done, "failed": tally.failed, "skipped": tally.skipped}
    report.event("summary", **counts, nfe=tally.nfe, out=run.store.where)
    more = f", {tally.failed} failed" if tally.failed else ""
    more += f", {tally.skipped} existed" if tally.skipped else ""
    report.note(f"{counted(tally.done, 'image')} in {run.store.where}{more}.")


def print_estimate(planned: PlannedRun, report: Report) -> None:
    """Print what a run would generate and cost, for --dry-run."""
    plan, output = planned.plan, planned.output
    sizes = list(zip(map(len, plan.members), plan.groups, strict=True))
    nfe = sum(count * max_nfe(settings) for count, settings in sizes)
    size = sum(count * _bytes_per_image(settings) for count, settings in sizes)
    names = [
        image_name(job, plan.groups[job.group], plan.jobs, output.template, output.encoding.suffix)
        for job in (planned.first, planned.last)
    ]
    batches = len(plan.batches())
    report.event(
        "plan",
        images=plan.jobs,
        duplicates=len(plan.duplicates),
        batches=batches,
        groups=len(plan.groups),
        nfe=nfe,
        bytes=int(size),
        first=names[0],
        last=names[1],
        hash=plan.hash,
    )
    report.result(
        f"{counted(plan.jobs, 'image')} ({counted(len(plan.duplicates), 'duplicate')} removed) in "
        f"{counted(batches, 'batch')}, {counted(len(plan.groups), 'setting')}\n"
        f"about {nfe} network evaluations, {size / 2**20:.1f} MiB\n"
        f"{names[0]}\n{names[1]}"
    )


def max_nfe(settings: JobSettings) -> int:
    """Largest NFE of an image: levels that the sampler evaluates, times branches of the rule."""
    ramp = [k / settings.steps for k in range(settings.steps, -1, -1)]
    grid = tuple(Level(round(999 * s), (1 - 0.999 * s * s) ** 0.5, s) for s in ramp)
    levels = registry.build("sampler", settings.sampler).levels(grid)
    needs = registry.build("guidance", settings.guidance).needs
    return (len(levels) - 1) * len(needs)


def _bytes_per_image(settings: JobSettings) -> float:
    pixels = (settings.height or 512) * (settings.width or 512)
    return BYTES_PER_PIXEL * pixels + BYTES_PER_JOB
