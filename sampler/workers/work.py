"""A worker: takes batches of a run, computes them, hands them to the writers.

The same code serves one process, the ranks of torchrun and the actors of Ray; they differ in where
the numbers of the batches come from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sampler import registry
from sampler.core.loop import Loop
from sampler.errors import IncompleteError
from sampler.runs import metadata
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import Job
from sampler.runs.writer import ImageWriter, WriteItem, failed_name
from sampler.workers import safety as flagged
from sampler.workers.batch_runner import BatchRunner, Failed, Made, Outcome, Stopped
from sampler.workers.prompt_cache import PromptCache

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    """How to work. drain: seconds that writers get when stopped; max_errors: then stop.

    on_oom, on_nonfinite: see `BatchRunner`; drop_encoders: all texts are encoded first, and the
    encoders' memory given back.
    """

    writer_threads: int = 2
    drain: float = 5.0
    strict: bool = False
    max_errors: int | None = None
    on_oom: Literal["shrink", "fail"] = "shrink"
    on_nonfinite: Literal["retry", "fail"] = "retry"
    drop_encoders: bool = False


@dataclass
class Tally:
    """What came of the batches. skipped: what was there already; oom: errors for want of memory."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    rows: int = 0
    oom: int = 0
    stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, lines: Lines) -> None:
        """Takes note of journal lines, from any thread."""
        with self._lock:
            for line in lines:
                self.done += line["status"] == "ok"
                self.failed += line["status"] == "error"
                self.rows += line.get("nfe") or 0
                self.oom += (line.get("error") or {}).get("code") == "oom"


def work(
    run: RunFolder,
    engine: Loop,
    batches: Iterable[int],
    missing: Mapping[int, Sequence[int]],
    options: Options,
    tally: Tally,
    told: Callable[[Lines], None] = lambda lines: None,
    stopped: Callable[[], bool] = lambda: False,
    texts: PromptCache | None = None,
) -> None:
    """Makes what is missing of these batches; a batch is always computed whole.

    told hears of journal lines when they are on disk. texts: kept from one call to the next.
    Raises SamplerError: 5 where results cannot be written, 3 beyond max_errors.
    """
    results = run.results()

    def shrunk(group: int, size: int) -> None:
        run.store.commit([], [{"event": "micro", "group": group, "size": size}])

    def written(lines: Lines) -> None:
        for line in lines:
            old = results.entries.get(line["key"])
            if line["status"] == "ok" and old is not None and old["status"] == "error":
                run.store.remove(failed_name(line["index"]))
        tally.count(lines)
        told(lines)

    texts = texts or PromptCache(engine.pipeline)
    if options.drop_encoders:
        texts.encode_all(_texts(run, engine, missing))
    compute = BatchRunner(
        engine,
        stopped,
        shrunk,
        dict(results.micro),
        options.strict,
        options.on_oom,
        options.on_nonfinite,
        texts,
    )
    pump = ImageWriter(run.store, options.writer_threads, written)
    with pump:
        try:
            for number in batches:
                if stopped():
                    raise Stopped
                batch = run.batches[number]
                jobs = run.jobs_of(batch.jobs)
                outcomes = compute.batch(jobs, run.groups)
                wanted = set(missing.get(number, batch.jobs))
                pump.put([_item(run, engine, number, job, outcome)
                          for job, outcome in zip(jobs, outcomes, strict=True)
                          if job.index in wanted])  # fmt: skip
                if options.max_errors is not None and tally.failed > options.max_errors:
                    raise IncompleteError(f"More than {options.max_errors} images failed.")
        except (Stopped, KeyboardInterrupt):
            tally.stopped = True
            pump.close(options.drain)


def _texts(run: RunFolder, engine: Loop, batches: Iterable[int]) -> Iterator[tuple[Any, ...]]:
    """(prompt, negative, guided, size) of every row of these batches."""
    for number in batches:
        batch = run.batches[number]
        settings = run.groups[batch.group]
        guided = "uncond" in registry.build("guidance", settings.guidance).needs
        size = engine.pipeline.size(settings.height, settings.width)
        for job in run.jobs_of(batch.jobs):
            yield job.prompt, job.negative_prompt, guided, size


def _item(run: RunFolder, engine: Loop, batch: int, job: Job, outcome: Outcome) -> WriteItem:
    """The journal line of an outcome, and the image."""
    line: dict[str, Any] = {
        "key": job.key,
        "index": job.index,
        "status": "error",
        "seed": job.seed,
        "batch": batch,
    }
    if isinstance(outcome, Made):
        outcome = flagged.apply_safety_policy(engine, outcome, run.output.flagged)
    if isinstance(outcome, Failed):
        error = {"code": outcome.code, "where": outcome.where, "message": outcome.message}
        status = "skipped" if outcome.code == "flagged" else "error"
        return WriteItem({**line, "status": status, "error": error})
    height, width, _ = outcome.pixels.shape
    settings = run.groups[job.group]
    texts = metadata.texts(
        job, settings, run.model, (height, width), run.output.metadata, metadata.library_versions()
    )
    line |= {
        "status": "ok",
        "file": run.name(job),
        "nfe": outcome.nfe,
        "ms": outcome.ms,
        "micro": outcome.micro,
        "w": width,
        "h": height,
        "warnings": list(outcome.warnings),
    }
    return WriteItem(line, outcome.pixels, texts)
