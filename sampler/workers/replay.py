"""Regenerate an image from its record.

From its run, with its batch, the result is bit-equal. From an image file it is computed alone, and
networks may round differently than in the original batch: about 1e-6, usually no 8-bit level.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sampler.core.errors import IncompleteError, UsageError
from sampler.core.loop import Loop
from sampler.runs import metadata
from sampler.runs.encodings import Encoding, media_size
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import Job, JobSettings, canonical
from sampler.runs.media import Sound
from sampler.runs.relocation import groups_again
from sampler.workers.batch_runner import BatchRunner
from sampler.workers.outcomes import GeneratedImage, Outcome
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.work import dtype_of


def from_run(run: RunFolder, engine: Loop, index: int, encoding: Encoding) -> bytes:
    """File content of an image; its planned batch is computed in full."""
    entry = run.results().entries.get(run.key(index), {})
    batch = next(batch for batch in run.batches if index in batch.jobs)
    jobs = run.jobs_of(batch.jobs)
    micro = {batch.group: int(entry.get("micro") or len(jobs))}
    runner = BatchRunner(engine, PromptCache(engine.pipeline), micro=micro)
    pixels = pixels_of(runner.batch(jobs, groups_again(run))[list(batch.jobs).index(index)])
    job = run.job(index)
    settings = run.groups[job.group]
    size = media_size(pixels)
    libraries, dtype = metadata.library_versions(), dtype_of(engine)
    texts = metadata.texts(job, settings, run.model, size, run.output.metadata, libraries, dtype)
    if not isinstance(pixels, Sound) and pixels.ndim == 4:
        encoding = replace(encoding, format=run.output.format)  # lossless frames, or not
    return encoding.encode(pixels, texts)


def from_record(engine: Loop, body: dict[str, Any], encoding: Encoding) -> bytes:
    """File content of an image from its record (`metadata.read_record`), computed alone."""
    record = body["record"]
    try:
        settings = JobSettings(
            record["steps"], record["height"], record["width"],
            record["sampler"], record["guidance"], _inputs(record), record.get("grid"),
        )  # fmt: skip
        job = Job(0, body["key"], 0, 0, record["prompt"], record["negative_prompt"], record["seed"])
    except KeyError as error:
        raise UsageError(f"The record lacks {error}.") from None
    (outcome,) = BatchRunner(engine, PromptCache(engine.pipeline)).batch([job], [settings])
    return encoding.encode(pixels_of(outcome), {metadata.CHUNK: canonical(body)})


def _inputs(record: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a record. Raises UsageError for files, of which a record holds the hash only."""
    inputs = record.get("inputs", {})
    if files := [name for name, value in inputs.items() if "sha256" in canonical(value)]:
        raise UsageError(
            f"The record holds only the hash of its input {files[0]}; replay it from its run."
        )
    return inputs


def pixels_of(outcome: Outcome) -> np.ndarray | Sound:
    """Pixels of a generated image. Raises IncompleteError for one that failed."""
    if not isinstance(outcome, GeneratedImage):
        raise IncompleteError(f"The image cannot be generated: {outcome.message}.")
    return outcome.pixels
