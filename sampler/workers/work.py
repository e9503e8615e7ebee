"""One worker: computes batches of a run and passes the images to writer threads.

The same code serves one process, the ranks of torchrun and the actors of Ray; only the source of
the batch numbers differs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sampler import registry
from sampler.core.errors import IncompleteError
from sampler.core.loop import Loop
from sampler.runs import metadata
from sampler.runs.encodings import media_size
from sampler.runs.folder import Check, RunFolder
from sampler.runs.jobs import Job
from sampler.runs.relocation import groups_again
from sampler.runs.writer import ImageWriter, WriteItem, failed_name
from sampler.workers.batch_runner import BatchRunner, Stopped
from sampler.workers.outcomes import Failure, GeneratedImage, Outcome
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.safety import apply_safety_policy

JournalLines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class WorkOptions:
    """Settings of how a run is computed.

    retry_errors, check: what counts as missing, see `RunFolder.missing`. lease: seconds after which
    the batches of a silent worker go to others. drain: seconds for the writers after a stop
    request. max_errors: number of failures above which the run ends. on_oom, on_nonfinite: see
    `BatchRunner`. drop_encoders: encode all prompts first, then free the encoders.
    """

    retry_errors: bool = False
    check: Check = "size"
    lease: float = 60.0
    writer_threads: int = 2
    drain: float = 5.0
    strict: bool = False
    max_errors: int | None = None
    on_oom: Literal["shrink", "fail"] = "shrink"
    on_nonfinite: Literal["retry", "fail"] = "retry"
    drop_encoders: bool = False


@dataclass
class Tally:
    """Number of images by outcome. skipped: those that existed before; oom: failed for memory."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    nfe: int = 0
    oom: int = 0
    stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, lines: JournalLines) -> None:
        """Count journal lines, from any thread."""
        with self._lock:
            for line in lines:
                self.done += line["status"] == "ok"
                self.failed += line["status"] == "error"
                self.nfe += line.get("nfe") or 0
                self.oom += (line.get("error") or {}).get("code") == "oom"


def work(
    run: RunFolder,
    engine: Loop,
    batches: Iterable[int],
    missing: Mapping[int, Sequence[int]],
    options: WorkOptions,
    tally: Tally,
    on_written: Callable[[JournalLines], None] = lambda lines: None,
    stopped: Callable[[], bool] = lambda: False,
    cache: PromptCache | None = None,
) -> None:
    """Generate the missing images of these batches; a batch is always computed in full.

    on_written: receives journal lines once they are on disk. cache: encoded prompts to share
    between calls. Raises StorageError, and IncompleteError above max_errors.
    """
    results = run.results()

    def shrunk(group: int, size: int) -> None:
        run.store.commit([], [{"event": "micro", "group": group, "size": size}])

    def written(lines: JournalLines) -> None:
        for line in lines:
            old = results.entries.get(line["key"])
            if line["status"] == "ok" and old is not None and old["status"] == "error":
                run.store.remove(failed_name(line["index"]))
        tally.count(lines)
        on_written(lines)

    cache = cache or PromptCache(engine.pipeline)
    if options.drop_encoders and not engine.hosted:
        cache.encode_all(_prompts(run, engine, missing))
    runner = BatchRunner(
        engine,
        cache,
        stopped,
        shrunk,
        dict(results.micro),
        options.strict,
        options.on_oom,
        options.on_nonfinite,
    )
    groups = groups_again(run)
    with ImageWriter(run.store, options.writer_threads, written) as writer:
        try:
            for number in batches:
                if stopped():
                    raise Stopped
                batch = run.batches[number]
                jobs = run.jobs_of(batch.jobs)
                outcomes = runner.batch(jobs, groups)
                wanted = set(missing.get(number, batch.jobs))
                writer.put([_item(run, engine, number, job, outcome)
                            for job, outcome in zip(jobs, outcomes, strict=True)
                            if job.index in wanted])  # fmt: skip
                if options.max_errors is not None and tally.failed > options.max_errors:
                    raise IncompleteError(f"More than {options.max_errors} images failed.")
        except (Stopped, KeyboardInterrupt):
            tally.stopped = True
            writer.close(options.drain)


def _prompts(run: RunFolder, engine: Loop, batches: Iterable[int]) -> Iterator[tuple[Any, ...]]:
    """Yield (prompt, negative, guided, size) for the jobs of these batches."""
    for number in batches:
        batch = run.batches[number]
        settings = run.groups[batch.group]
        guided = "uncond" in registry.build("guidance", settings.guidance).needs
        size = engine.pipeline.size(settings.height, settings.width)
        for job in run.jobs_of(batch.jobs):
            yield job.prompt, job.negative_prompt, guided, size


def dtype_of(engine: Loop) -> str:
    """Data type of an engine's network: what "auto" has become on this machine."""
    return str(engine.pipeline.dtype).removeprefix("torch.")


def _item(run: RunFolder, engine: Loop, batch: int, job: Job, outcome: Outcome) -> WriteItem:
    """Journal line of an outcome, with the image."""
    line: dict[str, Any] = {
        "key": job.key,
        "index": job.index,
        "status": "error",
        "seed": job.seed,
        "batch": batch,
    }
    if isinstance(outcome, GeneratedImage):
        outcome = apply_safety_policy(engine, outcome, run.output.flagged)
    if isinstance(outcome, Failure):
        error = {"code": outcome.code, "where": outcome.where, "message": outcome.message}
        status = "skipped" if outcome.code == "flagged" else "error"
        return WriteItem({**line, "status": status, "error": error})
    height, width = media_size(outcome.pixels)
    texts = metadata.texts(
        job,
        run.groups[job.group],
        run.model,
        (height, width),
        run.output.metadata,
        metadata.library_versions(),
        dtype_of(engine),
    )
    line |= {
        "status": "ok",
        "dtype": dtype_of(engine),
        "file": run.name(job, outcome.pixels),
        "nfe": outcome.nfe,
        "ms": outcome.ms,
        "micro": outcome.micro,
        "w": width,
        "h": height,
        "warnings": list(outcome.warnings),
    }
    return WriteItem(line, outcome.pixels, texts, run.output.encoding)
