"""Computation of one planned batch, with recovery from errors.

Out of memory: halve the micro-batch inside the planned batch, and remember its size for the group.
Exception: halve the batch until the failing sample is alone; all others are generated.
Not finite: fail the image and name the component and the step; a decode is retried in float32
first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sampler import registry
from sampler.core.batch import Sample, sample_batch
from sampler.core.binding import SamplerContext, bind_sampler
from sampler.core.errors import SamplerError
from sampler.core.images import to_pixels
from sampler.core.loop import Loop
from sampler.core.prompt_weights import UNREAD, has_weights
from sampler.runs.jobs import Job, JobSettings
from sampler.types import Snapshot
from sampler.workers.outcomes import Failure, GeneratedImage, Outcome, failure_of
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.recovery import (
    decode_float32,
    free_memory,
    is_finite,
    is_out_of_memory,
)


class Stopped(BaseException):
    """The run was asked to stop; not an error of a sample."""


class _OutOfMemory(Exception):
    """A batch did not fit into memory."""


def runs_hosted(engine: Loop, settings: JobSettings) -> bool:
    """Return True if the stock pipeline's own call generates the images of a group."""
    return engine.hosted or bool(settings.inputs) or engine.pipeline.frames is not None


@dataclass
class BatchRunner:
    """Runs the batches of one run on an engine.

    cache: encoded prompts. stopped: polled at every step. on_shrink(group, size): called when
    memory requires a smaller micro-batch; micro: their sizes by group. strict: an exception ends
    the run. on_oom "fail": a batch that exceeds the memory fails instead of being halved;
    on_nonfinite "fail": a decode that overflows is not retried.
    """

    engine: Loop
    cache: PromptCache
    stopped: Callable[[], bool] = lambda: False
    on_shrink: Callable[[int, int], None] = lambda group, size: None
    micro: dict[int, int] = field(default_factory=dict[int, int])
    strict: bool = False
    on_oom: Literal["shrink", "fail"] = "shrink"
    on_nonfinite: Literal["retry", "fail"] = "retry"

    def batch(self, jobs: Sequence[Job], groups: Sequence[JobSettings]) -> list[Outcome]:
        """Outcomes of the jobs of one planned batch, in order. Raises Stopped.

        groups: those of the run; the groups of the jobs differ at most in the guidance scale.
        """
        group = jobs[0].group
        outcomes: list[Outcome] = []
        while len(outcomes) < len(jobs):
            done = len(outcomes)
            part = jobs[done : done + self.micro.get(group, len(jobs))]
            try:
                outcomes += self._run_or_split(part, groups)
                continue
            except _OutOfMemory:
                pass
            # Outside of the handler: the traceback of the exception holds the tensors.
            free_memory()
            self.micro[group] = len(part) // 2
            self.on_shrink(group, self.micro[group])
        return outcomes

    def _run_or_split(self, jobs: Sequence[Job], groups: Sequence[JobSettings]) -> list[Outcome]:
        """Run a batch; after an exception each half, down to the failing sample."""
        try:
            return self._run_batch(jobs, groups)
        except Exception as error:
            memory = is_out_of_memory(error)
            if memory and len(jobs) > 1 and self.on_oom == "shrink":
                raise _OutOfMemory from None
            if self.strict and not memory:
                raise SamplerError(
                    f"Image {jobs[0].index}: {failure_of(error, False).message}"
                ) from error
            if len(jobs) == 1 or memory:
                return [failure_of(error, memory)] * len(jobs)
        half = len(jobs) // 2
        return self._run_or_split(jobs[:half], groups) + self._run_or_split(jobs[half:], groups)

    def _run_batch(self, jobs: Sequence[Job], groups: Sequence[JobSettings]) -> list[Outcome]:
        started, settings = time.perf_counter(), groups[jobs[0].group]
        if runs_hosted(self.engine, settings):
            return self._run_hosted(jobs, [groups[job.group] for job in jobs], started)
        engine = self.engine.with_grid_for(
            settings.grid, settings.sampler, settings.guidance, settings.steps
        )
        adapter = engine.pipeline
        rule = _rule([groups[job.group].guidance for job in jobs], adapter.device)
        size = adapter.size(settings.height, settings.width)
        grid = adapter.grid(settings.steps, size)
        method = registry.build("sampler", settings.sampler)
        method = bind_sampler(method, SamplerContext(adapter, grid, dict(settings.guidance), size))
        samples = [Sample(job.prompt, job.negative_prompt, job.seed) for job in jobs]
        watch = _StepWatch(len(samples), self.stopped)
        with torch.no_grad(), adapter.exclusive():
            cond = self.cache.encode(
                [sample.prompt for sample in samples],
                [sample.negative for sample in samples],
                "uncond" in rule.needs,
                size,
            )
            done = sample_batch(
                engine, samples, size, settings.steps, method, rule, cond, watch.step
            )
            images, failures, notes = self._decode(done.latents, watch)
            pixels = to_pixels(images)
        ms = round(1000 * (time.perf_counter() - started) / len(samples))
        outcomes: list[Outcome] = []
        for b, job in enumerate(jobs):
            if b in failures:
                outcomes.append(failures[b])
                continue
            found = (self.cache.warning(job.prompt), self._unread(job), notes.get(b))
            warnings = tuple(note for note in found if note)
            outcomes.append(GeneratedImage(pixels[b], done.nfe[b], ms, len(jobs), warnings))
        return outcomes

    def _run_hosted(
        self, jobs: Sequence[Job], settings: Sequence[JobSettings], started: float
    ) -> list[Outcome]:
        """Run a batch by the stock pipeline's own call."""
        engine = self.engine.as_hosted()
        rule = _rule([one.guidance for one in settings], engine.pipeline.device)
        samples = [Sample(job.prompt, job.negative_prompt, job.seed) for job in jobs]
        images, nfe = engine.call_stock(samples, settings[0], rule, self._watch_stock)
        ms = round(1000 * (time.perf_counter() - started) / len(samples))
        outcomes: list[Outcome] = []
        for job, image, count in zip(jobs, images, nfe, strict=True):
            if image is not None:
                unread = self._unread(job)
                warnings = (unread,) if unread else ()
                outcomes.append(GeneratedImage(image, count, ms, len(jobs), warnings))
            else:
                message = "the pipeline returned no image, video or sound"
                outcomes.append(Failure("exception", "output", message))
        return outcomes

    def _unread(self, job: Job) -> str | None:
        """Warning for prompt weights that the pipeline takes as text."""
        reads = getattr(self.engine.pipeline, "prompt_weights", None) is not None
        return UNREAD if not reads and has_weights((job.prompt, job.negative_prompt)) else None

    def _watch_stock(self, snapshot: Snapshot) -> None:
        """Raise Stopped on request, and an error where a sample stops being finite."""
        if self.stopped():
            raise Stopped
        if not bool(is_finite(snapshot.x).all()):
            raise ArithmeticError(f"the latents are not finite after step {snapshot.index - 1}")

    def _decode(
        self, x: Tensor, watch: _StepWatch
    ) -> tuple[Tensor, dict[int, Failure], dict[int, str]]:
        """Images [B, 3, H, W], failed samples, and notes on those that float32 recovered."""
        images = self.engine.pipeline.decode(x)
        bad_steps = watch.first_bad().tolist()
        finite = is_finite(images).tolist()
        failures, notes = {}, {}
        for b, step in enumerate(bad_steps):
            if step >= 0:
                message = f"the latents are not finite after step {step}"
                failures[b] = Failure("nonfinite", "denoiser", message)
            elif not bool(torch.isfinite(x[b]).all()):
                failures[b] = Failure("nonfinite", "sampler", "the result is not finite")
            elif not finite[b]:
                again = self._retry_decode(x[b : b + 1])
                if again is not None and bool(is_finite(again)[0]):
                    images[b] = again[0].to(images)
                    notes[b] = "decoded in float32: the decoder's own precision overflowed"
                else:
                    message = "the decoded image is not finite"
                    failures[b] = Failure("nonfinite", "vae", message)
        return images, failures, notes

    def _retry_decode(self, x: Tensor) -> Tensor | None:
        """Decode in float32, if retries are enabled and the decoder has another precision."""
        return decode_float32(self.engine.pipeline, x) if self.on_nonfinite == "retry" else None


class _StepWatch:
    """Step callback: raises Stopped on request, records where a sample stops being finite."""

    def __init__(self, count: int, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped
        self._bad: Tensor | None = None
        self._count = count

    def step(self, snapshot: Snapshot) -> None:
        """Record without a device synchronisation: the step numbers stay on the device."""
        if self._stopped():
            raise Stopped
        good = is_finite(snapshot.x)
        if self._bad is None:
            self._bad = torch.full_like(good, -1, dtype=torch.int64)
        self._bad = torch.where((self._bad < 0) & ~good, snapshot.index - 1, self._bad)

    def first_bad(self) -> Tensor:
        """First step [B] whose latents are not finite, or -1."""
        return torch.full((self._count,), -1) if self._bad is None else self._bad.cpu()


def _rule(specs: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
    """Rule of some samples; with a scale per sample if their scales differ."""
    rule = registry.build("guidance", specs[0])
    scales = [spec.get("scale") for spec in specs]
    if len(set(scales)) == 1:
        return rule
    return replace(rule, scale=torch.tensor(scales, dtype=torch.float32, device=device))
