"""An image again from its record: bit-equal from its run, where its batch is known.

From an image file alone it is computed alone, which a network may round differently than in the
batch that it came from: about 1e-6, usually no level of the 8-bit image.
"""

from __future__ import annotations

from typing import Any

from sampler.core.loop import Loop
from sampler.errors import IncompleteError, UsageError
from sampler.runs import metadata, png
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import Job, JobSettings, canonical
from sampler.workers.batch_runner import BatchRunner, Made, Outcome


def from_run(run: RunFolder, engine: Loop, index: int) -> bytes:
    """The file of an image, its planned batch computed as it was."""
    entry = run.results().entries.get(run.key(index), {})
    batch = next(batch for batch in run.batches if index in batch.jobs)
    jobs = run.jobs_of(batch.jobs)
    compute = BatchRunner(engine, micro={batch.group: int(entry.get("micro") or len(jobs))})
    outcomes = compute.batch(jobs, run.groups)
    made = _made(outcomes[list(batch.jobs).index(index)])
    job = run.job(index)
    settings = run.groups[job.group]
    size = (made.pixels.shape[0], made.pixels.shape[1])
    texts = metadata.texts(
        job, settings, run.model, size, run.output.metadata, metadata.library_versions()
    )
    return png.encode(made.pixels, texts)


def from_record(engine: Loop, body: dict[str, Any]) -> bytes:
    """The same from a record as `metadata.read_record` gives it, computed alone."""
    record = body["record"]
    try:
        settings = JobSettings(
            record["steps"], record["height"], record["width"],
            record["sampler"], record["guidance"],
        )  # fmt: skip
        job = Job(0, body["key"], 0, 0, record["prompt"], record["negative_prompt"], record["seed"])
    except KeyError as error:
        raise UsageError(f"The record lacks {error}.") from None
    (outcome,) = BatchRunner(engine).batch([job], [settings])
    made = _made(outcome)
    return png.encode(made.pixels, {metadata.CHUNK: canonical(body)})


def _made(outcome: Outcome) -> Made:
    if not isinstance(outcome, Made):
        raise IncompleteError(f"The image cannot be made: {outcome.message}.")
    return outcome
