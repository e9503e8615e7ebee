"""One planned batch to pixels: the loop, what may go wrong in it, and what stays of it then.

Out of memory: the micro-batch is halved inside the planned batch, and remembered for the group.
An exception: the batch is halved too, until the row that raises stands alone; the others are made.
Not finite: the row is an error that names the component and the step; a decode is tried again in
float32 first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sampler import registry
from sampler.core.batch import Job as PromptLine
from sampler.core.batch import sample_batch
from sampler.core.binding import SamplerContext, bind_sampler
from sampler.core.images import to_pixels
from sampler.core.loop import Loop
from sampler.errors import SamplerError
from sampler.runs.jobs import Job, JobSettings
from sampler.types import Snapshot
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.recovery import decode_float32, finite, free_memory, is_memory


class Stopped(BaseException):
    """The run was told to stop; no error of a row."""


class _OutOfMemory(Exception):
    """Several rows together need more memory than there is."""


@dataclass(frozen=True)
class Made:
    """An image [H, W, 3] of uint8, what it cost, and how many rows were computed together."""

    pixels: np.ndarray
    nfe: int
    ms: int
    micro: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """Why there is no image. code: oom, nonfinite, exception or flagged."""

    code: str
    where: str
    message: str


Outcome = Made | Failed


@dataclass
class BatchRunner:
    """An engine at work for one run. micro: the batch size by group that memory allowed.

    stopped is asked at every step. strict: an exception ends the run. on_oom "fail": a batch for
    which memory is too small fails instead of being halved; on_nonfinite "fail": a decode that
    overflows is not tried again. texts: what knows the prompts already.
    """

    engine: Loop
    stopped: Callable[[], bool] = lambda: False
    shrunk: Callable[[int, int], None] = lambda group, size: None
    micro: dict[int, int] = field(default_factory=dict[int, int])
    strict: bool = False
    on_oom: Literal["shrink", "fail"] = "shrink"
    on_nonfinite: Literal["retry", "fail"] = "retry"
    texts: PromptCache | None = None

    def batch(self, jobs: Sequence[Job], groups: Sequence[JobSettings]) -> list[Outcome]:
        """The outcomes of the jobs of one planned batch, in order. Raises Stopped.

        groups: the run's; those of the jobs differ in the guidance scale at most.
        """
        group = jobs[0].group
        self.texts = self.texts or PromptCache(self.engine.pipeline)
        outcomes: list[Outcome] = []
        while len(outcomes) < len(jobs):
            done = len(outcomes)
            part = jobs[done : done + self.micro.get(group, len(jobs))]
            try:
                outcomes += self._rows(part, groups, self.texts)
                continue
            except _OutOfMemory:
                pass
            # Out of the handler: the exception's traceback holds the tensors of the attempt.
            free_memory()
            self.micro[group] = len(part) // 2
            self.shrunk(group, self.micro[group])
        return outcomes

    def _rows(
        self, jobs: Sequence[Job], groups: Sequence[JobSettings], texts: PromptCache
    ) -> list[Outcome]:
        """Together; where that raises, each half by itself, down to the row that is at fault."""
        try:
            return self._run_batch(jobs, groups, texts)
        except Exception as error:
            memory = is_memory(error)
            if memory and len(jobs) > 1 and self.on_oom == "shrink":
                raise _OutOfMemory from None
            if self.strict and not memory:
                raise SamplerError(
                    f"Image {jobs[0].index}: {_failure(error, False).message}"
                ) from error
            if len(jobs) == 1 or memory:
                return [_failure(error, memory)] * len(jobs)
        half = len(jobs) // 2
        return self._rows(jobs[:half], groups, texts) + self._rows(jobs[half:], groups, texts)

    def _run_batch(
        self, jobs: Sequence[Job], groups: Sequence[JobSettings], texts: PromptCache
    ) -> list[Outcome]:
        started, settings = time.perf_counter(), groups[jobs[0].group]
        adapter = self.engine.pipeline
        method = registry.build("sampler", settings.sampler)
        rule = _rule([groups[job.group].guidance for job in jobs], adapter.device)
        size = adapter.size(settings.height, settings.width)
        grid = adapter.grid(settings.steps, size)
        method = bind_sampler(method, SamplerContext(adapter, grid, dict(settings.guidance), size))
        rows = [PromptLine(job.prompt, job.negative_prompt, job.seed) for job in jobs]
        watch = _Watch(len(rows), self.stopped)
        with torch.no_grad(), adapter.exclusive():
            cond = texts.encode(
                [row.prompt for row in rows],
                [row.negative for row in rows],
                "uncond" in rule.needs,
                size,
            )
            x, nfe = sample_batch(
                self.engine, rows, size, settings.steps, method, rule, cond, watch.step
            )
            images, broken, notes = self._decoded(x, watch)
            pixels = to_pixels(images)
        ms = round(1000 * (time.perf_counter() - started) / len(rows))
        outcomes: list[Outcome] = []
        for b, job in enumerate(jobs):
            if b in broken:
                outcomes.append(broken[b])
                continue
            long = texts.warning(job.prompt)
            warnings = tuple(note for note in (long, notes.get(b)) if note)
            outcomes.append(Made(pixels[b], nfe[b], ms, len(jobs), warnings))
        return outcomes

    def _decoded(
        self, x: Tensor, watch: _Watch
    ) -> tuple[Tensor, dict[int, Failed], dict[int, str]]:
        """Images [B, 3, H, W], the rows that are broken, notes on those that float32 saved."""
        images = self.engine.pipeline.decode(x)
        bad_steps = watch.first_bad().tolist()
        whole = finite(images).tolist()
        broken, notes = {}, {}
        for b, step in enumerate(bad_steps):
            if step >= 0:
                message = f"the latents are not finite after step {step}"
                broken[b] = Failed("nonfinite", "denoiser", message)
            elif not bool(torch.isfinite(x[b]).all()):
                broken[b] = Failed("nonfinite", "sampler", "the result is not finite")
            elif not whole[b]:
                again = self._retry_decode(x[b : b + 1])
                if again is not None and bool(finite(again)[0]):
                    images[b] = again[0].to(images)
                    notes[b] = "decoded in float32: the decoder's own precision overflowed"
                else:
                    message = "the decoded image is not finite"
                    broken[b] = Failed("nonfinite", "vae", message)
        return images, broken, notes

    def _retry_decode(self, x: Tensor) -> Tensor | None:
        """A decode in float32, where the run wants it and that is another one."""
        return decode_float32(self.engine.pipeline, x) if self.on_nonfinite == "retry" else None


class _Watch:
    """Looks at every step: stops when told to, and remembers where a row stopped being finite."""

    def __init__(self, rows: int, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped
        self._bad: Tensor | None = None
        self._rows = rows

    def step(self, snapshot: Snapshot) -> None:
        """No synchronisation with a device: the numbers of the steps stay there until the end."""
        if self._stopped():
            raise Stopped
        good = finite(snapshot.x)
        if self._bad is None:
            self._bad = torch.full_like(good, -1, dtype=torch.int64)
        self._bad = torch.where((self._bad < 0) & ~good, snapshot.index - 1, self._bad)

    def first_bad(self) -> Tensor:
        """Per row the first step whose latents are not finite, or -1."""
        return torch.full((self._rows,), -1) if self._bad is None else self._bad.cpu()


def _rule(specs: Sequence[Mapping[str, Any]], device: Any) -> Any:
    """The rule of some rows; where their scales differ, with a scale per row."""
    rule = registry.build("guidance", specs[0])
    scales = [spec.get("scale") for spec in specs]
    if len(set(scales)) == 1:
        return rule
    return replace(rule, scale=torch.tensor(scales, dtype=torch.float32, device=device))


def _failure(error: BaseException, memory: bool) -> Failed:
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if memory:
        return Failed("oom", "device", "out of memory")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "?") if trace is not None else "?"
    return Failed("exception", str(where), f"{type(error).__name__}: {text}")
