"""`--dry-run`: what a run would be, without loading a model or writing anything."""

from __future__ import annotations

from typing import Any

from sampler import registry
from sampler.cli.report import Report, counted
from sampler.runs.jobs import Job, JobSettings, Model
from sampler.runs.names import image_name
from sampler.runs.source import Source
from sampler.types import Level

BYTES_PER_PIXEL = 1.7  # of our PNGs of the bundled model, records included
BYTES_PER_JOB = 700  # its lines in jobs.jsonl and the journal


def tell(source: Source, model: Model, report: Report) -> None:
    """Jobs, duplicates, batches, denoiser rows, disk, first and last file name."""
    planner = source.planner(model)
    first: Job | None = None
    last: Job | None = None
    for last in planner.jobs(source.rows(), source.is_text):
        first = first or last
    assert first is not None and last is not None
    plan = planner.plan
    counts = [len(members) for members in plan.members]
    rows = sum(n * rows_per_image(s) for n, s in zip(counts, plan.groups, strict=True))
    size = sum(n * bytes_per_image(s) for n, s in zip(counts, plan.groups, strict=True))
    template = source.config.output.name_template
    names = [image_name(job, plan.groups[job.group], plan.jobs, template) for job in (first, last)]
    facts: dict[str, Any] = {
        "images": plan.jobs,
        "duplicates": len(plan.duplicates),
        "batches": len(plan.batches()),
        "groups": len(plan.groups),
        "rows": rows,
        "bytes": int(size),
        "first": names[0],
        "last": names[1],
        "hash": plan.hash,
    }
    report.event("plan", **facts)
    report.result(
        f"{counted(plan.jobs, 'image')} ({counted(len(plan.duplicates), 'duplicate')} removed) in "
        f"{counted(facts['batches'], 'batch')}, {counted(len(plan.groups), 'setting')}\n"
        f"about {rows} denoiser rows, {size / 2**20:.1f} MiB\n"
        f"{names[0]}\n{names[1]}"
    )
    for problem in source.skipped:
        report.note(f"sampler: skipped: {problem}")


def rows_per_image(settings: JobSettings) -> int:
    """Denoiser rows at most: steps as the sampler walks them, times the rule's branches."""
    ramp = [k / settings.steps for k in range(settings.steps, -1, -1)]
    grid = tuple(Level(round(999 * s), (1 - 0.999 * s * s) ** 0.5, s) for s in ramp)
    walked = registry.build("sampler", settings.sampler).levels(grid)
    needs = registry.build("guidance", settings.guidance).needs
    return (len(walked) - 1) * len(needs)


def bytes_per_image(settings: JobSettings) -> float:
    pixels = (settings.height or 512) * (settings.width or 512)
    return BYTES_PER_PIXEL * pixels + BYTES_PER_JOB
